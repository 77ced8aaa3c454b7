"""Sequences read in chunks of tokens, and the decays within a chunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def read_tokens(
    step: Callable[..., Any],
    chunk: Callable[..., Any],
    state: Float[Array, "*batch n_heads v_head_dim head_dim"],
    tokens: tuple[Float[Array, "..."] | None, ...],
    chunk_size: int,
) -> tuple[
    Float[Array, "*batch seq n_heads v_head_dim"],
    Float[Array, "*batch n_heads v_head_dim head_dim"],
]:
    """A memory a head, by a recurrence for one token and by chunks for more.

    `jax.checkpoint` makes every derivative recompute a chunk from the state at its
    start: memory is that of one chunk and of the states between them. The last chunk is
    filled with zeros, which must not change the state.

    **Arguments:**

    - `step`: `step(state, token) -> (state, outputs)`, without an axis of tokens.
    - `chunk`: the same for tokens on the axis after the heads.
    - `state`: before the first token; its dtype is that of the computation.
    - `tokens`: what is read, `(*batch, seq, n_heads, ...)` each.
    - `chunk_size`: tokens of a chunk at most. All chunks are equally long.

    **Returns:**

    The outputs, and the state after the last token.
    """
    axis, dtype = state.ndim - 3, state.dtype
    by_head = jax.tree.map(
        lambda x: jnp.moveaxis(x.astype(dtype), axis, axis + 1), tokens
    )
    axis, seq = axis + 1, by_head[0].shape[axis + 1]
    first = jax.tree.map(
        lambda x: jax.lax.index_in_dim(x, 0, axis, keepdims=False), by_head
    )
    if seq == 1:
        state, y = step(state, first)
        return jnp.expand_dims(y, axis - 1), state
    # A sum has the type of both its terms; see `kernels._carry.start_of`.
    state = state + jnp.zeros_like(step(state, first)[0])
    count = -(-seq // chunk_size)
    size = -(-seq // count)

    def split(x):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * size - seq)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    # Inside of a scan nothing is merged with the forward pass.
    body = jax.checkpoint(chunk, prevent_cse=False)
    state, y = jax.lax.scan(body, state, jax.tree.map(split, by_head))
    y = jnp.moveaxis(y, 0, axis)
    y = y.reshape(*y.shape[:axis], count * size, y.shape[-1])
    y = jax.lax.slice_in_dim(y, 0, seq, axis=axis)
    return jnp.moveaxis(y, axis, axis - 1), state


def forgetting(
    log_decay: Float[Array, "*decays"], reset: Bool[Array, "*batch seq"]
) -> Float[Array, "*decays"]:
    """`log_decay`, `(*batch, seq, ...)`, with minus infinity where `reset`."""
    extra = log_decay.ndim - reset.ndim
    starts = reset.reshape(*reset.shape, *[1] * extra)
    return jnp.where(jnp.broadcast_to(starts, log_decay.shape), -jnp.inf, log_decay)


def decays(
    log_decay: Float[Array, "*batch seq n"],
) -> tuple[Float[Array, "*batch seq seq n"], Float[Array, "*batch seq n"]]:
    r"""What is left of each token at each later one, and of what came before.

    $$b_{ij} = \exp \sum_{m = j + 1}^{i} a_m \;(j \le i), \quad 0 \;(j > i), \qquad
    e_i = \exp \sum_{m = 1}^{i} a_m$$

    Every sum is added up by itself. As a difference of running sums it would have the
    rounding error of these, and be no number where a decay forgets all. No exponent is
    positive if no `log_decay` is, so that nothing overflows.

    **Arguments:**

    - `log_decay`: $a$, `(*batch, seq, n)`; minus infinity forgets.

    **Returns:**

    $b$, `(*batch, i, j, n)`, and $e$, `(*batch, i, n)`.
    """
    *batch, size, n = log_decay.shape
    shape = (*batch, size, size, n)
    token = jax.lax.broadcasted_iota(jnp.int32, shape, len(batch))
    earlier = jax.lax.broadcasted_iota(jnp.int32, shape, len(batch) + 1)
    each = jnp.broadcast_to(log_decay[..., :, None, :], shape)
    sums = jnp.cumsum(jnp.where(token > earlier, each, 0.0), axis=-3)
    between = jnp.exp(jnp.where(token >= earlier, sums, -jnp.inf))
    return between, jnp.exp(jnp.cumsum(log_decay, axis=-2))
