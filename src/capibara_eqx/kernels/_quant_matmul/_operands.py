from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from ...internal import accumulate, accumulator_dtype
from ._decode import Packing, decode_codes


class Operands(NamedTuple):
    """What every backend takes: flat tokens and one packed matrix."""

    x: Float[Array, "tokens in"]
    codes: UInt8[Array, "out bytes"]
    scale: Float[Array, "rows groups"]
    zero: UInt8[Array, "rows groups"] | None

    @property
    def dtype(self) -> jnp.dtype:
        """Of sums."""
        return accumulator_dtype(self.x.dtype, self.scale.dtype)

    def dense(self, packing: Packing) -> Float[Array, "out in"]:
        return decode_codes(self.codes, self.scale, self.zero, packing).astype(
            self.dtype
        )


# The largest code of an activation: the range is symmetric, so that -x gives -q.
_LARGEST = 127


def quantize_tokens(
    x: Float[Array, "*batch in"],
) -> tuple[Int8[Array, "*batch in"], Float[Array, "*batch 1"]]:
    """Eight bits for every token by itself, and the token's step."""
    x = accumulate(x)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    step = jnp.where(largest > 0, largest / _LARGEST, 1)
    # Of a largest value that is subnormal the step is zero.
    step = jnp.where(step > 0, step, 1)
    codes = jnp.round(x / step)
    return jnp.clip(codes, -_LARGEST, _LARGEST).astype(jnp.int8), step


def round_tokens(x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
    """What `quant_matmul` rounds tokens to with `activations="int8"`.

    Derivatives pass as if nothing were rounded.

    **Arguments:**

    - `x`: `(*batch, in)`.

    **Returns:**

    The same shape, in float32 or wider.

    !!! example

        ```python
        round_tokens(jnp.array([1.0, 0.5, 0.0]))       # steps of 1/127
        ```
    """
    x = accumulate(x)
    codes, step = quantize_tokens(jax.lax.stop_gradient(x))
    nearest = codes.astype(step.dtype) * jnp.broadcast_to(step, codes.shape)
    # The first two are zero together, to the bit.
    return x - jax.lax.stop_gradient(x) + nearest
