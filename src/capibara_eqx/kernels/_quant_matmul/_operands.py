from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, UInt8

from ...internal import accumulate, accumulator_dtype
from ._decode import Packing, decode_codes


class Operands(NamedTuple):
    """What every backend takes: flat tokens and one packed matrix.

    `input_scale` is the step of all tokens that are rounded, `None` if each has its
    own.
    """

    x: Float[Array, "tokens in"]
    codes: UInt8[Array, "out bytes"]
    scale: Float[Array, "rows groups"]
    zero: UInt8[Array, "rows groups"] | None
    input_scale: Float[Array, ""] | None = None

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
    x: Float[Array, "*batch in"], step: Float[Array, ""] | None = None
) -> tuple[Int8[Array, "*batch in"], Float[Array, "*batch 1"]]:
    """Eight bits for every token, and its step: that of all, or its own."""
    x = accumulate(x)
    if step is not None:
        return _by_one_step(x, step.astype(x.dtype))
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    step = jnp.where(largest > 0, largest / _LARGEST, 1)
    # Of a largest value that is subnormal the step is zero.
    step = jnp.where(step > 0, step, 1)
    codes = jnp.round(x / step)
    return jnp.clip(codes, -_LARGEST, _LARGEST).astype(jnp.int8), step


def _by_one_step(x, step):
    steps = _in_steps(x, step)
    codes = jnp.clip(jnp.round(steps), -_LARGEST, _LARGEST).astype(jnp.int8)
    # No whole number is NaN: a token that holds one would pass for another.
    lost = jnp.any(jnp.isnan(steps), axis=-1, keepdims=True)
    return codes, jnp.where(lost, jnp.nan, jnp.broadcast_to(step, lost.shape))


def _in_steps(x, step):
    # Not a division, of which XLA makes a product with the inverse or does not,
    # depending on what is compiled together: ties would fall this way or that.
    return x * jnp.broadcast_to(1 / step, x.shape)


def round_tokens(
    x: Float[Array, "*batch in"], step: Float[Array, ""] | None = None
) -> Float[Array, "*batch in"]:
    """What `quant_matmul` rounds tokens to with `activations="int8"`.

    With a `step` what it rounds them to with `"static_int8"`. Derivatives pass as if
    nothing were rounded, but not to what lies beyond 127 steps, nor to the step.

    **Arguments:**

    - `x`: `(*batch, in)`.
    - `step`: of all tokens, `()`; each has its own if not given.

    **Returns:**

    The same shape, in float32 or wider.

    !!! example

        ```python
        round_tokens(jnp.array([1.0, 0.5, 0.0]))       # steps of 1/127
        ```
    """
    x = accumulate(x)
    codes, steps = quantize_tokens(*jax.lax.stop_gradient((x, step)))
    nearest = codes.astype(steps.dtype) * jnp.broadcast_to(steps, codes.shape)
    through = x if step is None else jnp.where(unclipped(x, step), x, 0)
    # The first two are zero together, to the bit.
    return through - jax.lax.stop_gradient(through) + nearest


def unclipped(
    x: Float[Array, "*batch in"], step: Float[Array, ""]
) -> Bool[Array, "*batch in"]:
    """Whether the nearest whole number of steps is one of eight bits."""
    x = jax.lax.stop_gradient(accumulate(x))
    steps = _in_steps(x, jax.lax.stop_gradient(step).astype(x.dtype))
    return jnp.abs(jnp.round(steps)) <= _LARGEST
