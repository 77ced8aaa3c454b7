from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ._inner_loop import check_optimizer
from ._meta_gradient import meta_value_and_grad
from ._selection import split


class MetaState(eqx.Module):
    """All that meta-training changes: model, optimiser state, number of steps."""

    model: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


def init_meta_state(
    model: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    where: PyTree = eqx.is_inexact_array,
) -> MetaState:
    """The state before the first step of `make_meta_step`.

    **Arguments:**

    - `model`, `optimizer`: of the outer loop.
    - `where`: as for `make_meta_step`.

    **Raises:**

    `ValueError` for a `where` that chooses nothing, or an `optimizer` that is none.

    !!! example

        ```python
        state = init_meta_state(model, optax.adam(1e-3))
        ```
    """
    check_optimizer("init_meta_state", optimizer)
    params, _ = split("init_meta_state", model, where)
    return MetaState(model, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_meta_step(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    *,
    where: PyTree = eqx.is_inexact_array,
    has_aux: bool = False,
) -> Callable[..., tuple[MetaState, Any]]:
    """A compiled step of the outer loop.

    **Arguments:**

    - `optimizer`: any optax transformation.
    - `loss`: `loss(model, task, *, key=None)`, such as `maml(...)`.
    - `where`: the leaves of the model that are learned; see `adapt`.
    - `has_aux`: whether `loss` returns `(loss, aux)`.

    **Returns:**

    `step(state, tasks, key=None) -> (state, value)`, with `value` the mean loss over
    the tasks before the step, or `(mean loss, aux)`. Tasks that are sharded over their
    leading axis stay so.

    **Raises:**

    `ValueError` for an `optimizer` that is none; when called, for a `state` that was
    made with another `optimizer` or `where`, and what `meta_value_and_grad` and `loss`
    raise.

    !!! example

        ```python
        optimizer = optax.adam(1e-3)
        step = make_meta_step(optimizer, maml(loss, optimizer=sgd(0.01), steps=1))
        state = init_meta_state(model, optimizer)
        state, value = step(state, tasks)
        ```
    """
    check_optimizer("make_meta_step", optimizer)
    takes_any = optax.with_extra_args_support(optimizer)

    @eqx.filter_jit
    def step(state, tasks, key=None):
        params, rest = _parts(state, optimizer, where)
        differentiate = meta_value_and_grad(
            loss, tasks, where=where, has_aux=has_aux, key=key
        )
        found, grads = differentiate(state.model)
        # Of a complex number jax gives the conjugate of the way up.
        grads = jax.tree.map(jnp.conj, grads)

        def value_of(found):
            return found[0] if has_aux else found

        # optax's Adam raises a float to an integer power; strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = takes_any.update(
                grads,
                state.opt_state,
                params,
                value=value_of(found),
                grad=grads,
                value_fn=lambda params: value_of(
                    differentiate(eqx.combine(params, rest))[0]
                ),
            )
            params = optax.apply_updates(params, updates)
        model = eqx.combine(params, rest)
        return MetaState(model, opt_state, state.step + 1), found

    return step


def _parts(
    state: Any, optimizer: optax.GradientTransformation, where: PyTree
) -> tuple[PyTree, PyTree]:
    """What is learned of the model of a state, and the rest; the state is checked."""
    if not isinstance(state, MetaState):
        raise ValueError(
            f"make_meta_step: `state` must be a MetaState, got {type(state).__name__}. "
            "Make it with `meta.init_meta_state(model, optimizer)`."
        )
    params, rest = split("make_meta_step", state.model, where)
    expected = eqx.filter_eval_shape(optimizer.init, params)
    if jax.tree.structure(expected) != jax.tree.structure(state.opt_state):
        raise ValueError(
            "make_meta_step: the `opt_state` of `state` is that of another `optimizer` "
            "or of another `where`. Pass the same to `meta.init_meta_state` and to "
            "`meta.make_meta_step`."
        )
    return params, rest
