import jax.numpy as jnp
from jaxtyping import Array, Float

from ...internal import accumulate
from ._decode import Packing
from ._operands import Operands, quantize_tokens


def quant_matmul(
    operands: Operands, packing: Packing, activations: str | None
) -> Float[Array, "tokens out"]:
    """`kernels.quant_matmul` with the matrix, and the rounded tokens, written out."""
    x = accumulate(operands.x)
    if activations is not None:
        codes, step = quantize_tokens(x, operands.input_scale)
        x = codes.astype(step.dtype) * step
    x = x.astype(operands.dtype)
    return jnp.einsum("ti,oi->to", x, operands.dense(packing))
