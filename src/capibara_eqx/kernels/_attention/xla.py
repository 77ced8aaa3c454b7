import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...internal import accumulate
from ._visibility import Visibility
from .reference import Dropping


def attention(
    query: Float[Array, "*batch query heads d"],
    key: Float[Array, "*batch key kv_heads d"],
    value: Float[Array, "*batch key kv_heads v"],
    seen: Visibility,
    scale: float,
    dropping: Dropping | None,
) -> Float[Array, "*batch query heads v"]:
    """`kernels.attention` as `jax.nn.dot_product_attention`, which holds all scores."""
    if query.dtype == jnp.float64:
        raise NotImplementedError(
            "jax.nn.dot_product_attention takes the softmax in float32, here it would "
            "be of float64; use 'blockwise' or 'reference'"
        )
    # Its backward pass mixes narrow dtypes with float32: strict promotion forbids it.
    q, k, v = (accumulate(x) for x in (query, key, value))
    return of_jax("xla", q, k, v, seen, scale, dropping).astype(query.dtype)


def cudnn(
    query: Float[Array, "*batch query heads d"],
    key: Float[Array, "*batch key kv_heads d"],
    value: Float[Array, "*batch key kv_heads v"],
    seen: Visibility,
    scale: float,
    dropping: Dropping | None,
) -> Float[Array, "*batch query heads v"]:
    """`kernels.attention` as cuDNN's, which has a first derivative only."""
    reason = unavailable()
    if reason is not None:
        raise NotImplementedError(reason)
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"cuDNN's attention takes bfloat16 and float16, not {query.dtype}"
        )
    return of_jax("cudnn", query, key, value, seen, scale, dropping)


def unavailable() -> str | None:
    """Why cuDNN's attention does not run here, `None` if it does."""
    if jax.default_backend() == "gpu":
        return None
    return f"runs on cuda; jax runs on {jax.default_backend()} here"


def of_jax(name, query, key, value, seen, scale, dropping):
    if dropping is not None:
        raise NotImplementedError(
            "jax.nn.dot_product_attention has no dropout; use 'blockwise'"
        )
    *batch, length, heads, d = query.shape
    v = value.shape[-1]
    # It wants keys and values of equal width: zeros change neither scores nor sums.
    wide = max(d, v)
    query, key, value = (
        _four_axes(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, wide - x.shape[-1])]))
        for x in (query, key, value)
    )
    visible = seen.pairs()
    mask = None
    if visible is not None:
        rows = (*batch, *visible.shape[-3:])
        mask = _four_axes(jnp.broadcast_to(visible, rows))
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, implementation=name
    )
    if mask is not None:
        # Where nothing is seen it returns the mean of all values.
        some = jnp.moveaxis(jnp.any(mask, axis=-1), -1, -2)[..., None]
        out = jnp.where(some, out, jnp.zeros_like(out))
    return out.reshape(*batch, length, heads, wide)[..., :v]


def _four_axes(x):
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
