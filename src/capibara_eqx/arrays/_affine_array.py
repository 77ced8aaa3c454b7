from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt8

from ..kernels import decode_codes, pack_codes, quant_matmul, unpack_codes
from ._affine import Affine, affine_codes, affine_steps, positive_step
from ._input_scale import check_input_scale
from ._weight import AbstractWeight, take_rows


class AffineArray(AbstractWeight):
    r"""A weight as packed codes of a few bits, steps and zero points; see `Affine`.

    - `codes`: as `kernels.pack_codes` packs them, `(*stack, out, bytes)`.
    - `scale`: the steps, `(*stack, rows, groups)`.
    - `zero`: the zero points, packed likewise along the groups, or `None`.
    - `input_scale`: the step of all inputs with `"static_int8"`, `(*stack,)`, or
        `None`.

    !!! example

        ```python
        weight = AffineArray.compress(linear.weight, Affine(4, group_size=64))
        y = weight @ x                                 # (out,)
        ```
    """

    codes: UInt8[Array, "*rows bytes"]
    scale: Float[Array, "*steps groups"]
    zero: UInt8[Array, "*steps zero_bytes"] | None
    spec: Affine = eqx.field(static=True)
    in_features: int = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)
    input_scale: Float[Array, "*stack"] | None = None

    @classmethod
    def compress(
        cls,
        weight: Float[Array, "*stack out in"],
        spec: Affine,
        step: Float[Array, "*stack rows groups"] | None = None,
        input_scale: Float[Array, "*stack"] | None = None,
    ) -> "AffineArray":
        """The nearest codes to a weight.

        **Arguments:**

        - `weight`: `(*stack, out, in)`.
        - `spec`: how to round it.
        - `step`: of every group, as training learned it; calibrated if not given.
        - `input_scale`: the step of all inputs, with `activations="static_int8"`.

        **Raises:**

        `ValueError` for an `input_scale` too many or too few, or of another shape.

        !!! example

            ```python
            weight = AffineArray.compress(jnp.ones((3, 5)), Affine(8))
            ```
        """
        scale, zero = affine_steps(weight, spec)
        if step is not None:
            scale = positive_step(step).astype(scale.dtype)
        codes = affine_codes(weight, scale, zero, spec)
        return cls.from_codes(codes, scale, zero, spec, weight.dtype, input_scale)

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Array, "*stack out in"],
        scale: Float[Array, "*stack rows groups"],
        zero: UInt8[Array, "*stack rows groups"] | None,
        spec: Affine,
        dtype: Any,
        input_scale: Float[Array, "*stack"] | None = None,
    ) -> "AffineArray":
        """Codes, steps and zero points that something else found, packed."""
        check_input_scale(spec, input_scale, codes.shape[:-2])
        return cls(
            codes=pack_codes(codes, spec.bits),
            scale=scale,
            zero=None if zero is None else pack_codes(zero, spec.bits),
            spec=spec,
            in_features=codes.shape[-1],
            dtype=jnp.dtype(dtype),
            input_scale=input_scale,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.in_features)

    @property
    def zero_points(self) -> UInt8[Array, "*steps groups"] | None:
        """The zero points, one by one."""
        if self.zero is None:
            return None
        return unpack_codes(self.zero, self.spec.bits, self.scale.shape[-1])

    def dense(self) -> Float[Array, "*rows in"]:
        packing = self.spec.packing(self.in_features)
        matrix = decode_codes(self.codes, self.scale, self.zero_points, packing)
        return matrix.astype(self.dtype)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return quant_matmul(
            x,
            self.codes,
            self.scale,
            self.zero_points,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
            activations=self.spec.activations,
            input_scale=self.input_scale,
        )

    def rows(self, index: Integer[Array, "*batch"]) -> Float[Array, "*batch in"]:
        return take_rows(self, index)
