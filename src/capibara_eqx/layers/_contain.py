"""What is not finite, kept to the tokens that it may reach.

Chunks are products with masks, and infinity times a zero of the mask is no number: a
token that is not finite would spoil those before it, and other documents of the row. So
it is left out of the products, and no number is put where it reaches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Spoiled(NamedTuple):
    """Where outputs are no number, and for which heads the state at the end is none."""

    outputs: Bool[Array, "*batch seq n_heads"]
    state: Bool[Array, "*batch n_heads"]

    def put(
        self, o: Float[Array, "*batch seq n_heads v_head_dim"]
    ) -> Float[Array, "*batch seq n_heads v_head_dim"]:
        """`o` with NaN where it depends on what is not finite."""
        return jnp.where(self.outputs[..., None], jnp.nan, o)

    def put_in_state(
        self, state: Float[Array, "*batch n_heads d k"]
    ) -> Float[Array, "*batch n_heads d k"]:
        """`state`, likewise."""
        return jnp.where(self.state[..., None, None], jnp.nan, state)


def find_spoiled(
    written: tuple[Array, ...],
    read: Float[Array, "*batch seq n_heads head_dim"],
    state: tuple[Float[Array, "*batch n_heads d k"], ...],
    reset: Bool[Array, "*batch seq"] | None,
) -> Spoiled:
    """What reaches whom.

    **Arguments:**

    - `written`: what tokens add to the state, `(*batch, seq, n_heads, ...)` each: it
        reaches all tokens from its own to the end of the document.
    - `read`: what they read it with, which reaches no other token.
    - `state`: before the first token; it reaches the first document.
    - `reset`: where documents start that are not the first one.
    """
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
    spoiled = (last_bad >= jnp.maximum(last_start, 0)) | (
        (last_start < 0) & jnp.expand_dims(entered, axis)
    )
    last = jax.lax.index_in_dim(spoiled, -1, axis, keepdims=False)
    return Spoiled(spoiled | _strange(read, axis + 2), last)


def finite(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` with zeros where it is not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def finite_decay(log_decay: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Zeros for what is no decay; minus infinity is one, which forgets."""
    return jnp.where(log_decay < jnp.inf, log_decay, jnp.zeros_like(log_decay))


def strange_decay(log_decay: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """NaN where `log_decay` is no decay, for `find_spoiled`."""
    return jnp.where(log_decay < jnp.inf, jnp.zeros_like(log_decay), jnp.nan)


def _strange(x: Array, kept: int) -> Array:
    """Where anything is not finite, over all but the first `kept` axes."""
    return jnp.any(~jnp.isfinite(x), axis=tuple(range(kept, x.ndim)))
