import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def promote_dtypes(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The narrowest dtype that holds all of `dtypes`, under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def accumulator_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype in which sums, norms, softmaxes and scans over `dtypes` are carried.

    float32 or wider: bfloat16 and float16 become float32, float64 stays float64,
    complex dtypes stay complex.
    """
    return promote_dtypes(jnp.float32, *dtypes)


def accumulate(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x` in its accumulator dtype (see `accumulator_dtype`)."""
    return x.astype(accumulator_dtype(x.dtype))
