import equinox as eqx
from jaxtyping import Array, DTypeLike, Float

from ..arrays import Affine, AffineArray
from ..internal import check_flag, check_range
from ._compress_array import compress_array


class AffineQuantizer(eqx.Module):
    r"""Rounds arrays to whole numbers of a few bits times a step, and back.

    $$c = \mathrm{clip}(\mathrm{round}(w / s) + z), \quad \hat w = s\,(c - z)$$

    Jacob et al., *Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference*, arXiv 1712.05877. `Affine` has all that decides
    the steps, and `transforms.quantize` does the same to the weights of a model.

    !!! example

        ```python
        quantizer = AffineQuantizer(num_bits=4, symmetric=False)
        matrix = jax.random.normal(key, (6, 10))
        small = quantizer.quantize(matrix)             # an AffineArray
        error = jnp.abs(quantizer.dequantize(small) - matrix)
        bool(jnp.all(error <= 0.51 * small.scale))     # True: half a step
        ```
    """

    spec: Affine = eqx.field(static=True)

    def __init__(
        self,
        num_bits: int = 8,
        symmetric: bool = True,
        channel_wise: bool = True,
        group_size: int | None = None,
        range: str | None = None,
        calibration: str = "minmax",
        percentile: float = 99.9,
        scale_dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `num_bits`: of a code, 2 to 8.
        - `symmetric`: whether zero is the middle code, else there are zero points.
        - `channel_wise`: a step for each row along the last axis, else one a matrix,
            of the last two axes.
        - `group_size`, `range`, `calibration`, `percentile`, `scale_dtype`: see
            `Affine`.

        **Raises:**

        `ValueError` for an argument outside of what is listed, or two that do not fit.
        """
        check_flag("channel_wise", channel_wise)
        hint = "`quantize_to_158bit` has three values, 1.58 bits."
        check_range("num_bits", num_bits, least=2, most=8, hint=hint)
        self.spec = Affine(
            num_bits,
            symmetric,
            "channel" if channel_wise else "tensor",
            group_size,
            range,
            calibration,
            percentile,
            scale_dtype=scale_dtype,
        )

    def quantize(self, weights: Float[Array, "*stack in"]) -> AffineArray:
        """**Arguments:**

        - `weights`: `(*stack, in)`, of any float dtype: a vector, a matrix
            `(out, in)`, or many. The kernel of a convolution, whose channels have
            several axes, as `(out, -1)`.

        **Returns:**

        An `AffineArray` of the same shape: packed codes, steps and zero points. It
        stands for the rounded array wherever a layer has a weight.

        **Raises:**

        `ValueError` for weights that are not floating point, not finite, empty, or
        compressed already.
        """
        # Of an `Affine` nothing else comes.
        node = compress_array("AffineQuantizer.quantize", weights, self.spec)
        assert isinstance(node, AffineArray)
        return node

    def dequantize(self, quantized: AffineArray) -> Float[Array, "*stack in"]:
        """**Arguments:**

        - `quantized`: what `quantize` returned, of this quantizer or another.

        **Returns:**

        The array that it stands for, in the dtype of the weights.

        **Raises:**

        `ValueError` for anything else.
        """
        if not isinstance(quantized, AffineArray):
            raise ValueError(
                "AffineQuantizer.dequantize: `quantized` must be an AffineArray, as "
                f"`quantize` returns, got {type(quantized).__name__}."
            )
        return quantized.dense()
