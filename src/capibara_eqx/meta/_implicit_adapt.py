from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..internal import check_range, check_size
from ._implicit_rule import Solver, proximal, with_implicit_gradient
from ._inner_loop import call_loss, check_batch, inner_loop
from ._selection import split


def implicit_adapt(
    loss: Callable[..., Any],
    model: PyTree,
    support: PyTree,
    *,
    strength: int | float | Float[Array, ""],
    optimizer: optax.GradientTransformation,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
    cg_steps: int | None = None,
    cg_tolerance: float | None = None,
    key: PRNGKeyArray | None = None,
) -> PyTree:
    r"""A model that has learned a task near its start, with derivatives of the optimum.

    $$\phi^* = \arg\min_\phi\, L(\phi, S) + \frac{\lambda}{2} |\phi - \theta|^2, \qquad
    \frac{d\phi^*}{d\theta} = \Big(I + \tfrac1\lambda \nabla^2 L(\phi^*, S)\Big)^{-1}$$

    Rajeswaran et al., *Meta-Learning with Implicit Gradients*, arXiv 1909.04630. The
    optimiser looks for $\phi^*$ and leaves no trace in derivatives, nor does memory
    grow with its steps. A gradient is one linear system, which conjugate gradients
    solve; it is as good as the point that the optimiser reached: as exact as
    $\nabla L + \lambda (\phi - \theta)$ is small there.

    By the same theorem gradients reach the other leaves of the model, arrays of
    `support`, what `loss` closes over, and $\lambda$. They reach nothing inside of
    `optimizer`. Of the loss the gradients of gradients are taken, in reverse mode, so
    that layers with a backward pass of their own serve; for the same reason there are
    no derivatives in forward mode.

    **Arguments:**

    - `loss`, `model`, `support`, `where`: as for `adapt`. The leaves that adapt are
        real.
    - `strength`: $\lambda$, positive, and large enough that $\nabla^2 L + \lambda I$
        is positive definite, which makes the optimum one.
    - `optimizer`, `steps`: of the inner loop, which starts at the model.
    - `cg_steps`: how many steps conjugate gradients make at most, whatever they reach:
        the approximation of the paper, which takes 5. If not given, they go on to the
        tolerance, and 1000 steps that do not reach it are an error.
    - `cg_tolerance`: norm of the remaining error of the system over that of its right
        hand side at which they stop. If not given, 1e-5, or what the products with the
        Hessian can reach in the dtype of the leaves that adapt.
    - `key`: the same in every step, so that the loss stays one function.

    **Returns:**

    `model` with other values in the leaves that adapt.

    **Raises:**

    What `adapt` raises, and `ValueError` for a `strength` or `cg_tolerance` that is
    not positive, or complex leaves that adapt. At run time for a `strength` that is an
    array and not positive; and, when a gradient is taken, if conjugate gradients do not
    converge or find something that is not finite.

    !!! example

        ```python
        def after(model):
            adapted = implicit_adapt(
                loss, model, support, strength=1.0, optimizer=sgd(0.1), steps=20
            )
            return loss(adapted, query)

        gradients = eqx.filter_grad(after)(model)
        ```
    """
    params, rest = split("implicit_adapt", model, where)
    strength = _checked_strength(strength)
    _check_real(params)
    solver = _solver(cg_steps, cg_tolerance, params)
    check_batch("implicit_adapt", "support", support)

    def support_loss(params):
        model = eqx.combine(params, rest)
        return call_loss("implicit_adapt", loss, model, support, key)

    # A function that carries what it depends on: all that can have a gradient.
    objective = eqx.filter_closure_convert(support_loss, params)
    arrays, static = eqx.partition(objective, eqx.is_array)
    fixed = jax.lax.stop_gradient((params, strength, arrays))

    def proximal_loss(params, _):
        start, strength, arrays = fixed
        return proximal(eqx.combine(arrays, static), start, strength)(params)

    found = inner_loop(
        "implicit_adapt",
        proximal_loss,
        fixed[0],
        jax.tree.map(lambda _: None, params),
        support,
        optimizer=optimizer,
        steps=steps,
        first_order=True,
        remat=None,
        key=None,
        keep_all=False,
    )
    found = jax.lax.stop_gradient(found)
    found = with_implicit_gradient(static, solver, found, params, strength, arrays)
    return eqx.combine(found, rest)


def _checked_strength(strength: int | float | Float[Array, ""]) -> Float[Array, ""]:
    if not eqx.is_array(strength):
        check_range(
            "strength",
            strength,
            above=0,
            hint="It holds the adapted parameters near the start; without it there is "
            "`meta.adapt`.",
        )
    number = jnp.asarray(strength)
    if number.shape != ():
        raise ValueError(
            f"implicit_adapt: `strength` must be one number, got shape {number.shape}."
        )
    if not jnp.issubdtype(number.dtype, jnp.floating):
        number = number.astype(float)
    return eqx.error_if(
        number,
        ~(number > 0),
        "implicit_adapt: `strength` must be positive. Was it learned as it is? Its "
        "logarithm may be any number: pass `jnp.exp(log_strength)`.",
    )


def _solver(cg_steps: int | None, cg_tolerance: float | None, params: PyTree) -> Solver:
    if cg_steps is not None:
        check_size("cg_steps", cg_steps)
    if cg_tolerance is None:
        # A rounding of each product, and of the vector that it is compared with.
        roundings = [
            float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params)
        ]
        return Solver(cg_steps, max(1e-5, 8 * max(roundings)))
    check_range(
        "cg_tolerance",
        cg_tolerance,
        above=0,
        hint="It is relative; 1e-5 suits float32, 1e-10 float64.",
    )
    return Solver(cg_steps, cg_tolerance)


def _check_real(params: PyTree) -> None:
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                "implicit_adapt: `where` must choose real arrays, it chooses one of "
                f"{leaf.dtype}. Choose others, with `meta.only`, or use `meta.adapt`."
            )
