import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ...internal import accumulate, accumulator_dtype
from ._visibility import Visibility, grouped


# The probability of dropping a weight, and the key for the draws.
Dropping = tuple[Float[Array, ""], PRNGKeyArray]


def attention(
    query: Float[Array, "*batch query heads d"],
    key: Float[Array, "*batch key kv_heads d"],
    value: Float[Array, "*batch key kv_heads v"],
    seen: Visibility,
    scale: float,
    dropping: Dropping | None,
) -> Float[Array, "*batch query heads v"]:
    """The definition of `kernels.attention`: all scores at once."""
    dtype = accumulator_dtype(query.dtype)
    *batch, length, heads, d = query.shape
    kv_heads = key.shape[-2]
    q = query.reshape(*batch, length, kv_heads, heads // kv_heads, d)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", accumulate(q), accumulate(key))
    scores = scores * scale
    visible = seen.pairs()
    visible = (
        jnp.ones((1,) * scores.ndim, bool)
        if visible is None
        else grouped(visible, kv_heads)
    )
    highest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    # Twice `where`: what is not seen may overflow, and infinity times zero is NaN.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - highest, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    if dropping is not None:
        weights = weights * kept(dropping, weights.shape, dtype)
    out = jnp.einsum("...hgqk,...khv->...qhgv", weights, accumulate(value))
    return out.reshape(*batch, length, heads, value.shape[-1]).astype(query.dtype)


def kept(dropping: Dropping, shape: tuple[int, ...], dtype) -> Float[Array, "*shape"]:
    """Zero where a weight is dropped, elsewhere what makes up for it."""
    p, key = dropping
    keep = 1 - p
    # p = 1 keeps nothing; dividing by zero there would turn zeros into NaN.
    scale = jnp.where(keep == 0, 0, 1 / jnp.where(keep == 0, 1, keep))
    drawn = jax.random.bernoulli(key, keep, shape)
    return jnp.where(drawn, scale.astype(dtype), jnp.zeros((), dtype))
