from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jaxtyping import PRNGKeyArray, PyTree

from ._inner_loop import inner_loop
from ._selection import split


def adapt(
    loss: Callable[..., Any],
    model: PyTree,
    support: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
    first_order: bool = False,
    remat: str | None = None,
    key: PRNGKeyArray | None = None,
) -> PyTree:
    r"""A model after a few steps on a few examples, with derivatives.

    $$\theta_{k+1} = \theta_k + U(\nabla_\theta L(\theta_k, S),\, s_k), \qquad
    \theta_0 = \theta$$

    with the updates $U$ and states $s$ of any optimiser: Finn et al., *Model-Agnostic
    Meta-Learning*, arXiv 1703.03400. Gradients of what the result computes reach
    `model`, arrays that `support` holds and whatever the optimiser was made of, such as
    learned rates. It is one `jax.lax.scan`, works under `jit`, `vmap` over tasks and
    derivatives of any order, and changes nothing in place.

    **Arguments:**

    - `loss`: `loss(model, support, *, key=None)`, one real number. It is called with a
        key only if there is one.
    - `model`: any PyTree.
    - `support`: examples of the task, whatever `loss` takes.
    - `optimizer`: any `optax.GradientTransformation`. Adam divides by the root of
        something that may be zero: `meta.safe_adam` has derivatives there.
    - `steps`: how many, 0 or more; 0 returns the model as it is.
    - `where`: the leaves that adapt, as for `equinox.partition`: a function of a leaf
        or a PyTree of booleans; of those the floating point arrays. See `meta.only`.
    - `first_order`: whether inner gradients count as constants, so that the gradient at
        the start is that at the end: no second derivatives, and worse steps.
    - `remat`: what is kept for outer gradients. `None`: all that every step computes.
        `"step"`: the parameters before every step, which is then computed twice.
        `"nested"`: those before every $\sqrt{\text{steps}}$-th step, and of the
        steps between two such one run at a time; three times.
    - `key`: split over the steps.

    **Returns:**

    `model` with other values in the leaves that adapt.

    **Raises:**

    `ValueError` for a `where` that chooses nothing, an empty `support`, negative
    `steps`, a `loss` that is not one real number. At run time for a loss that is not
    finite, the message names the step, and for parameters that are not after the last.

    !!! example

        ```python
        def loss(model, batch, *, key=None):
            x, y = batch
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        def after(model):
            adapted = adapt(loss, model, support, optimizer=sgd(0.1), steps=5)
            return loss(adapted, query)

        gradients = eqx.filter_grad(after)(model)
        ```
    """
    params, rest = split("adapt", model, where)
    params = inner_loop(
        "adapt",
        loss,
        params,
        rest,
        support,
        optimizer=optimizer,
        steps=steps,
        first_order=first_order,
        remat=remat,
        key=key,
        keep_all=False,
    )
    return eqx.combine(params, rest)


def adapt_trajectory(
    loss: Callable[..., Any],
    model: PyTree,
    support: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
    first_order: bool = False,
    remat: str | None = None,
    key: PRNGKeyArray | None = None,
) -> PyTree:
    """The model after every step of `adapt`.

    **Arguments:**

    As for `adapt`.

    **Returns:**

    `model`, of which the leaves that adapt have a leading axis, `(steps, ...)`: the
    last is what `adapt` returns. The other leaves are not copied.

    **Raises:**

    As `adapt`.

    !!! example

        ```python
        path = adapt_trajectory(loss, model, support, optimizer=sgd(0.1), steps=5)
        moved, fixed = eqx.partition(path, eqx.is_inexact_array)     # the `where`
        at = lambda params: loss(eqx.combine(params, fixed), query)
        losses = jax.vmap(at)(moved)                                 # (5,)
        ```
    """
    params, rest = split("adapt_trajectory", model, where)
    params = inner_loop(
        "adapt_trajectory",
        loss,
        params,
        rest,
        support,
        optimizer=optimizer,
        steps=steps,
        first_order=first_order,
        remat=remat,
        key=key,
        keep_all=True,
    )
    return eqx.combine(params, rest)
