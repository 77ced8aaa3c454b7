from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from ..kernels import ssd


class LastToken(eqx.Module):
    """What the token after it takes in again: its maps, its input and its weight."""

    B: Float[Array, "*batch n_heads d_state"]
    u: Float[Array, "*batch n_heads head_dim"]
    weight: Float[Array, "*batch n_heads"]


def trapezoid(
    u: Float[Array, "*batch seq n_heads head_dim"],
    log_decay: Float[Array, "*batch seq n_heads"],
    B: Float[Array, "*batch seq n_heads d_state"],
    C: Float[Array, "*batch seq n_heads d_state"],
    now: Float[Array, "*batch seq n_heads"],
    before: Float[Array, "*batch seq n_heads"],
    state: Float[Array, "*batch n_heads head_dim d_state"],
    last: LastToken,
    *,
    segment_ids: Int[Array, "*batch seq"] | None,
    reset: Bool[Array, "*batch seq"] | None,
    **options: Any,
) -> tuple[
    Float[Array, "*batch seq n_heads head_dim"],
    Float[Array, "*batch n_heads head_dim d_state"],
    LastToken,
]:
    r"""A recurrence that takes in every token twice, as one call of `kernels.ssd`.

    $$h_t = e^{a_t} (h_{t-1} + w_t u_{t-1} B_{t-1}^\top) + c_t u_t B_t^\top, \quad
    y_t = h_t C_t$$

    What is left of $h_t$ without the last term is $g_t = e^{a_t} (g_{t-1} + (c_{t-1} +
    w_t) u_{t-1} B_{t-1}^\top)$: a dual of the tokens before, to which $y_t = g_t C_t +
    c_t (B_t \cdot C_t) u_t$ adds the token itself. No output meets a later token.

    **Arguments:**

    - `u`, `log_decay`, `B`, `C`: as `kernels.ssd` takes them, with a group a head.
    - `now`, `before`: $c$ and $w$.
    - `state`, `last`: $g$ and the last valid token before these.
    - `segment_ids`, `reset`: padding, and where a document starts.
    - `options`: of `kernels.ssd`.

    **Returns:**

    `y`, and `state` and `last` after the last valid token.
    """
    axis = log_decay.ndim - 2
    tokens = jax.tree.map(
        lambda first, rest: jnp.concatenate(
            [jnp.expand_dims(first, axis).astype(rest.dtype), rest], axis
        ),
        last,
        LastToken(B, u, now),
    )
    previous, end = _before(tokens, axis, segment_ids)
    taken = jnp.exp(log_decay) * (previous.weight + before)
    if segment_ids is not None:
        valid = segment_ids[..., None] >= 0
        taken = jnp.where(valid, taken, jnp.zeros_like(taken))
    if reset is not None:
        # Not a factor of zero, which may meet one that has overflowed.
        previous = jax.tree.map(lambda v: _unless(reset, v), previous)
        taken = _unless(reset, taken)
    y, state = ssd(
        previous.u,
        log_decay,
        previous.B,
        C,
        coefficient=taken,
        initial_state=state,
        reset=reset,
        **options,
    )
    y = y + (now * jnp.sum(B * C, axis=-1))[..., None] * u
    end = jax.tree.map(lambda v, w: v.astype(w.dtype), end, last)
    return y, state, end


def _before(tokens: LastToken, axis: int, segment_ids) -> tuple[LastToken, LastToken]:
    """The valid token before each, and the last one; the first is of a cache."""
    if segment_ids is not None:
        position = jnp.arange(1, segment_ids.shape[-1] + 1, dtype=jnp.int32)
        latest = jnp.where(segment_ids >= 0, position, 0)
        latest = jax.lax.cummax(latest, axis=axis)
        latest = jnp.concatenate([jnp.zeros_like(latest[..., :1]), latest], axis)
        tokens = jax.tree.map(
            lambda v: jnp.take_along_axis(v, _alongside(latest, v), axis), tokens
        )
    end = tokens.weight.shape[axis] - 1
    return (
        jax.tree.map(lambda v: jax.lax.slice_in_dim(v, 0, end, axis=axis), tokens),
        jax.tree.map(lambda v: jax.lax.index_in_dim(v, end, axis, False), tokens),
    )


def _unless(reset, stream: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    return jnp.where(_alongside(reset, stream), jnp.zeros_like(stream), stream)


def _alongside(x: Shaped[Array, "..."], stream: Shaped[Array, "..."]):
    """`x` with as many axes as `stream`."""
    return x.reshape(*x.shape, *[1] * (stream.ndim - x.ndim))
