"""Steps of an optimiser on a few leaves, as one scan that differentiates."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..internal import check_choice, check_flag


REMAT = (None, "step", "nested")


def inner_loop(
    function: str,
    loss: Callable[..., Any],
    params: PyTree,
    rest: PyTree,
    batch: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool,
    remat: str | None,
    key: PRNGKeyArray | None,
    keep_all: bool,
) -> PyTree:
    """`params` after `steps` steps, or after each of them, on a leading axis."""
    _check(function, optimizer, steps, first_order, remat)
    check_batch(function, "support", batch)
    takes_any = optax.with_extra_args_support(optimizer)

    def value(params, key):
        return call_loss(function, loss, eqx.combine(params, rest), batch, key)

    def step(carry, index):
        params, state = carry
        step_key = None if key is None else jax.random.fold_in(key, index)
        # Derivatives of a gradient that is stopped are not even computed.
        where = jax.lax.stop_gradient(params) if first_order else params
        found, grads = jax.value_and_grad(value)(where, step_key)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        # Of a complex number jax gives the conjugate of the way up.
        grads = jax.tree.map(jnp.conj, grads)
        # Some of optax raise a float to an integer power; strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = takes_any.update(
                grads,
                state,
                params,
                value=found,
                grad=grads,
                value_fn=lambda params: value(params, step_key),
            )
            params = optax.apply_updates(params, updates)
        found = jax.lax.stop_gradient(found)
        return (params, state), (params if keep_all else None, found)

    start = (params, takes_any.init(params))
    (last, _), (every, values) = _scan(step, start, steps, remat)
    return _finite(function, every if keep_all else last, values, params, last)


def _scan(step, carry, steps, remat):
    """`step` over the numbers below `steps`; what is kept for derivatives varies."""
    if remat is None:
        return jax.lax.scan(step, carry, jnp.arange(steps))
    # Inside of a scan nothing is merged with the forward pass.
    step = jax.checkpoint(step, prevent_cse=False)
    if remat == "step" or steps < 4:
        return jax.lax.scan(step, carry, jnp.arange(steps))
    # A state for each of about sqrt(steps) segments, and those within one of them.
    length = math.isqrt(steps)
    whole = steps - steps % length
    segments = jnp.arange(whole).reshape(-1, length)

    def segment(carry, indices):
        return jax.lax.scan(step, carry, indices)

    carry, first = jax.lax.scan(
        jax.checkpoint(segment, prevent_cse=False), carry, segments
    )
    carry, second = jax.lax.scan(step, carry, jnp.arange(whole, steps))
    outputs = jax.tree.map(
        lambda a, b: jnp.concatenate([a.reshape(whole, *a.shape[2:]), b]), first, second
    )
    return carry, outputs


def call_loss(
    function: str,
    loss: Callable[..., Any],
    model: PyTree,
    batch: PyTree,
    key: PRNGKeyArray | None,
) -> Float[Array, ""]:
    """`loss` of a batch, `ValueError` unless it is one real number.

    Without a key there is none to pass, so that losses need not have the argument.
    """
    found = loss(model, batch) if key is None else loss(model, batch, key=key)
    return check_loss(function, found)


def check_loss(function: str, found: Any) -> Float[Array, ""]:
    """`found`, what a loss returned; `ValueError` unless it is one real number."""
    kind = getattr(found, "dtype", type(found))
    shape = getattr(found, "shape", None)
    if shape != () or not jnp.issubdtype(kind, jnp.floating):
        what = type(found).__name__ if shape is None else f"{kind} of shape {shape}"
        raise ValueError(
            f"{function}: `loss` must return one real number, an array of shape (), "
            f"got {what}. Take the mean over the batch, and return nothing else."
        )
    return found


def check_optimizer(function: str, optimizer: Any) -> None:
    """Raise `ValueError` unless `optimizer` is a transformation of optax."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"{function}: `optimizer` must be an optax.GradientTransformation, got "
            f"{type(optimizer).__name__}. Pass `meta.sgd(0.1)` or `optax.sgd(0.1)`."
        )


def check_batch(function: str, argument: str, batch: PyTree) -> None:
    """Raise `ValueError` if an array of `batch` holds nothing."""
    for path, leaf in jtu.tree_leaves_with_path(batch):
        if 0 in getattr(leaf, "shape", ()):
            name = argument + jtu.keystr(path)
            raise ValueError(
                f"{function}: `{name}` must hold at least one example, got shape "
                f"{leaf.shape}. A task needs something to learn from and to be judged "
                "by."
            )


def check_steps(function: str, argument: str, steps: Any) -> None:
    """Raise `ValueError` unless `steps` is a whole number, 0 or more."""
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or steps < 0:
        raise ValueError(
            f"{function}: `{argument}` must be a whole number, 0 or more, got "
            f"{steps!r}. It is known while compiling: not an array."
        )


def _check(function, optimizer, steps, first_order, remat) -> None:
    check_steps(function, "steps", steps)
    check_flag("first_order", first_order)
    check_choice("remat", remat, REMAT)
    check_optimizer(function, optimizer)


def _finite(
    function: str,
    result: PyTree,
    values: Float[Array, " steps"],
    first: PyTree,
    last: PyTree,
) -> PyTree:
    """`result`; an error at run time if a loss was not finite, with its step.

    Nor may parameters be that were: after the last step there is no loss.
    """
    steps = values.shape[0]
    if not steps:
        return result
    lost = [
        jnp.any(jnp.isfinite(before) & ~jnp.isfinite(after))
        for before, after in zip(
            jax.tree.leaves(first), jax.tree.leaves(last), strict=True
        )
    ]
    lost = jnp.any(jnp.stack(lost), keepdims=True)
    broken = jnp.concatenate([~jnp.isfinite(values), lost])
    hint = "Is the inner rate too large, or is the support set not finite itself?"
    # Of one message a step, since only the number of a message is known at run time.
    messages = [
        f"{function}: the inner loss is not finite at step {step} of {steps}. {hint}"
        for step in range(1, steps + 1)
    ]
    messages.append(
        f"{function}: the parameters are not finite after the last of {steps} steps. "
        f"{hint}"
    )
    return eqx.branched_error_if(
        result, jnp.any(broken), jnp.argmax(broken).astype(jnp.int32), messages
    )
