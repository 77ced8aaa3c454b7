import jax.numpy as jnp
from jaxtyping import Array, Float

from ...internal import accumulate
from ._visibility import Visibility, grouped
from .reference import Dropping


def attention(
    query: Float[Array, "*batch query heads d"],
    key: Float[Array, "*batch key kv_heads d"],
    value: Float[Array, "*batch key kv_heads v"],
    seen: Visibility,
    scale: float,
    dropping: Dropping | None,
) -> Float[Array, "*batch query heads v"]:
    """`kernels.attention` of a single query, which is bound by reading the keys.

    Products are sums of products here, which XLA computes where the keys lie; for a
    product of matrices it would first copy all of them into another order.
    """
    if query.shape[-3] != 1 or dropping is not None:
        raise NotImplementedError("takes one query and no dropout; use 'blockwise'")
    *batch, _, heads, d = query.shape
    kv_heads = key.shape[-2]
    q = accumulate(query).reshape(*batch, 1, kv_heads, heads // kv_heads, d) * scale
    # (*batch, key, kv_heads, group)
    scores = jnp.sum(q * accumulate(key)[..., None, :], axis=-1)
    visible = seen.pairs()
    if visible is None:
        visible = jnp.ones((1,) * scores.ndim, bool)
    else:
        # (*batch, kv_heads, group, 1, key) before.
        visible = jnp.moveaxis(grouped(visible, kv_heads)[..., 0, :], -1, -3)
    highest = jnp.max(scores, -3, keepdims=True, where=visible, initial=-jnp.inf)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    # Twice `where`: what is not seen may overflow, and infinity times zero is NaN.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0)), 0)
    total = jnp.sum(weights, axis=-3, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.sum(weights[..., None] * accumulate(value)[..., None, :], axis=-4)
    return out.reshape(*batch, 1, heads, value.shape[-1]).astype(query.dtype)
