import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8, Integer, UInt8

from ..kernels import (
    Packing,
    decode_codes,
    pack_codes,
    pack_trits,
    quant_matmul,
    unpack_codes,
    unpack_trits,
)
from ._input_scale import check_input_scale
from ._ternary import Ternary, ternary_codes
from ._weight import AbstractWeight, take_rows


_BITS = 2
_MIDDLE = 2  # the code of zero, as the kernel counts
_LOWEST_TRIT = 1  # what is added to -1, 0 and 1 in base 3


class TernaryArray(AbstractWeight):
    r"""A weight of -1, 0 and 1 times one scale, four or five a byte; see `Ternary`.

    - `codes`: `(*stack, out, bytes)`, as `kernels.pack_codes` packs $T + 2$ in two
        bits, or `kernels.pack_trits` packs $T + 1$.
    - `scale`: what the codes are multiplied by, `(*stack, 1, 1)`.
    - `input_scale`: the step of all inputs with `"static_int8"`, `(*stack,)`, or
        `None`.

    !!! example

        ```python
        weight = TernaryArray.compress(linear.weight, Ternary())
        weight.ternary                                 # -1, 0 and 1
        ```
    """

    codes: UInt8[Array, "*rows bytes"]
    scale: Float[Array, "*ones 1"]
    spec: Ternary = eqx.field(static=True)
    in_features: int = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)
    input_scale: Float[Array, "*stack"] | None = None

    @classmethod
    def compress(
        cls,
        weight: Float[Array, "*stack out in"],
        spec: Ternary,
        step: Float[Array, "*stack 1 1"] | None = None,
        input_scale: Float[Array, "*stack"] | None = None,
    ) -> "TernaryArray":
        """The nearest codes to a weight.

        **Arguments:**

        - `weight`: `(*stack, out, in)`.
        - `spec`: how to scale and to pack.
        - `step`: the scale, as training learned it.
        - `input_scale`: the step of all inputs, with `activations="static_int8"`.

        **Raises:**

        `ValueError` for an `input_scale` too many or too few, or of another shape.

        !!! example

            ```python
            weight = TernaryArray.compress(jnp.eye(5), Ternary(scale="l2"))
            ```
        """
        codes, scale = ternary_codes(weight, spec, step)
        return cls.from_codes(codes, scale, spec, weight.dtype, input_scale)

    @classmethod
    def from_codes(
        cls,
        codes: Int8[Array, "*stack out in"],
        scale: Float[Array, "*stack 1 1"],
        spec: Ternary,
        dtype: DTypeLike,
        input_scale: Float[Array, "*stack"] | None = None,
    ) -> "TernaryArray":
        """-1, 0 and 1 and a scale that something else found, packed."""
        check_input_scale(spec, input_scale, codes.shape[:-2])
        if spec.packing == "base3":
            packed = pack_trits((codes + _LOWEST_TRIT).astype(jnp.uint8))
        else:
            packed = pack_codes((codes + _MIDDLE).astype(jnp.uint8), _BITS)
        return cls(
            codes=packed,
            scale=scale,
            spec=spec,
            in_features=codes.shape[-1],
            dtype=jnp.dtype(dtype),
            input_scale=input_scale,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.in_features)

    @property
    def ternary(self) -> Int8[Array, "*rows in"]:
        """-1, 0 and 1."""
        codes = unpack_codes(self.two_bits, _BITS, self.in_features)
        return codes.astype(jnp.int8) - _MIDDLE

    @property
    def two_bits(self) -> UInt8[Array, "*rows bytes"]:
        """The codes as the kernel reads them."""
        if self.spec.packing == "2bit":
            return self.codes
        trits = unpack_trits(self.codes, self.in_features)
        return pack_codes(trits + (_MIDDLE - _LOWEST_TRIT), _BITS)

    def dense(self) -> Float[Array, "*rows in"]:
        packing = Packing(_BITS, self.in_features)
        matrix = decode_codes(self.two_bits, self.scale, None, packing)
        return matrix.astype(self.dtype)

    def rows(self, index: Integer[Array, "*batch"]) -> Float[Array, "*batch in"]:
        return take_rows(self, index)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return quant_matmul(
            x,
            self.two_bits,
            self.scale,
            bits=_BITS,
            activations=self.spec.activations,
            input_scale=self.input_scale,
        )
