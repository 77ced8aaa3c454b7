import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from ..arrays import AbstractWeight, Spec, compress, is_weight


def compress_array(
    function: str, weights: Float[Array, "*stack in"], spec: Spec
) -> AbstractWeight:
    """`arrays.compress` for weights of one axis too: a row, whose node has one axis.

    `ValueError` for what no codes stand for, in the name of `function`.
    """
    if is_weight(weights):
        raise ValueError(
            f"{function}: `weights` must be an array, got {type(weights).__name__}, "
            "which is compressed already. Pass the array before, or its `dense()`."
        )
    weights = jnp.asarray(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"{function}: `weights` must be floating point, got {weights.dtype}. "
            "Convert them, as in `weights.astype(jnp.float32)`."
        )
    if weights.ndim == 0 or weights.size == 0:
        raise ValueError(
            f"{function}: `weights` must have at least one axis and one value, got "
            f"shape {weights.shape}."
        )
    weights = finite(function, weights)
    if weights.ndim > 1:
        return compress(weights, spec)
    # As `vmap` would slice it.
    return jax.tree.map(lambda leaf: leaf[0], compress(weights[None], spec))


def finite(function: str, weights: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The weights; `ValueError` if one is not finite, under `jit` when it runs."""
    whole = jnp.all(jnp.isfinite(weights))
    message = (
        f"{function}: `weights` are not finite: they hold NaN or infinity, which no "
        "code stands for. Did the training diverge?"
    )
    if isinstance(whole, Tracer):
        return eqx.error_if(weights, ~whole, message)
    if not whole:
        raise ValueError(message)
    return weights
