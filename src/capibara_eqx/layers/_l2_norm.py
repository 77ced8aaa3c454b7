import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..internal import accumulate


# Of the square of the length, as in the programs of the papers that normalise so.
_EPS = 1e-6


def l2_normalize(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """`x` at length one, in float32 or wider; zeros stay, with finite gradients."""
    x = accumulate(x)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)
