"""What is not finite, kept to the tokens that it may reach.

Chunks are products with masks, and infinity times a zero of the mask is no number: a
token that is not finite would spoil those before it, and other documents of the row. So
it is left out of the products, and no number is put where it reaches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


Arrays = tuple[Array, ...]


def contained(
    run: Callable[[Array, Arrays, Array | None, Arrays], tuple[Array, Any]],
    read: Float[Array, "*batch seq n_heads head_dim"],
    written: tuple[Float[Array, "..."], ...],
    log_decay: Float[Array, "..."] | None,
    state: tuple[Float[Array, "*batch n_heads d k"], ...],
    reset: Bool[Array, "*batch seq"] | None,
) -> tuple[Float[Array, "*batch seq n_heads v"], Any]:
    """`run(read, written, log_decay, state)`, with NaN where it is due and only there.

    **Arguments:**

    - `run`: returns outputs `(*batch, seq, n_heads, v)` and states, whose floating
        point leaves are `(*batch, n_heads, d, k)`. It gets finite arguments.
    - `read`: what tokens read the state with, which reaches no other token.
    - `written`: what they add to it, `(*batch, seq, n_heads, ...)` each. It reaches all
        tokens from its own to the end of the document.
    - `log_decay`: how they make it smaller, likewise; minus infinity forgets.
    - `state`: before the first token; it reaches the first document.
    - `reset`: where documents start that are not the first one.
    """
    if read.shape[-3] == 1 and reset is None:
        # All of it reaches the one token, and a recurrence passes it on.
        return run(read, written, log_decay, state)
    judged = written
    if log_decay is not None:
        decays = log_decay < jnp.inf
        none = jnp.zeros_like(log_decay)
        judged = (*written, jnp.where(decays, none, jnp.nan))
        log_decay = jnp.where(decays, log_decay, none)
    outputs, heads = _reached(read, judged, state, reset)
    given = (_finite(read), tuple(map(_finite, written)), log_decay)
    o, after = run(*given, tuple(map(_finite, state)))

    def spoil(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.where(heads[..., None, None], jnp.nan, x)

    return jnp.where(outputs[..., None], jnp.nan, o), jax.tree.map(spoil, after)


def _reached(
    read: Array, written: Arrays, state: Arrays, reset: Array | None
) -> tuple[Bool[Array, "*batch seq n_heads"], Bool[Array, "*batch n_heads"]]:
    """Which outputs, and which heads' states at the end, depend on no number."""
    axis = read.ndim - 3
    heads = read.shape[: axis + 2]
    bad = jnp.zeros(heads, jnp.bool_)
    for x in written:
        bad = bad | _strange(x, axis + 2)
    index = jax.lax.broadcasted_iota(jnp.int32, heads, axis)
    last_bad = jax.lax.cummax(jnp.where(bad, index, -1), axis=axis)
    last_start = jnp.full(heads, -1, jnp.int32)
    if reset is not None:
        starts = jnp.broadcast_to(reset[..., None], heads)
        last_start = jax.lax.cummax(jnp.where(starts, index, -1), axis=axis)
    entered = jnp.zeros((*heads[:axis], heads[-1]), jnp.bool_)
    for x in state:
        entered = entered | _strange(x, axis + 1)
    reached = (last_bad >= jnp.maximum(last_start, 0)) | (
        (last_start < 0) & jnp.expand_dims(entered, axis)
    )
    last = jax.lax.index_in_dim(reached, -1, axis, keepdims=False)
    return reached | _strange(read, axis + 2), last


def _finite(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` with zeros where it is not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _strange(x: Array, kept: int) -> Array:
    """Where anything is not finite, over all but the first `kept` axes."""
    return jnp.any(~jnp.isfinite(x), axis=tuple(range(kept, x.ndim)))
