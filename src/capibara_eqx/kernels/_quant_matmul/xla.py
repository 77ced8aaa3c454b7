import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from ._codes import unpack_codes
from ._decode import Packing
from ._operands import Operands, quantize_tokens


def quant_matmul(
    operands: Operands, packing: Packing, activations: str | None
) -> Float[Array, "tokens out"]:
    """`kernels.quant_matmul` by the products of XLA."""
    if activations is not None:
        return _whole_numbers(operands, packing)
    x = operands.x.astype(operands.dtype)
    if packing.groups > 1:
        return jnp.einsum("ti,oi->to", x, operands.dense(packing))
    # The scale of a whole row is put on its sums: fewer products than on the matrix.
    steps = operands._replace(scale=jnp.ones_like(operands.scale)).dense(packing)
    y = jnp.einsum("ti,oi->to", x, steps)
    return y * jnp.broadcast_to(operands.scale.astype(y.dtype).T, y.shape)


def _whole_numbers(operands: Operands, packing: Packing) -> Float[Array, "tokens out"]:
    """Products of eight bits by eight, summed in 32, one sum a group.

    Codes are counted from the middle to fit; a zero point elsewhere is made up for by
    the sum of the token.
    """
    x, step = quantize_tokens(operands.x, operands.input_scale)
    x, sums = _sums(x, _centred(operands, packing), packing)
    sums = sums.astype(operands.dtype)
    if operands.zero is not None:
        shift = operands.zero.astype(jnp.int32) - packing.middle
        of_tokens = jnp.sum(x, axis=-1, dtype=jnp.int32)
        product = of_tokens.T[:, :, None] * shift.T[:, None, :]
        sums = sums - jnp.broadcast_to(product.astype(sums.dtype), sums.shape)
    scale = operands.scale.astype(sums.dtype).T[:, None, :]
    y = jnp.sum(sums * jnp.broadcast_to(scale, sums.shape), axis=0)
    return y * jnp.broadcast_to(step.astype(y.dtype), y.shape)


def _sums(
    x: Int8[Array, "tokens in"], centred: Int8[Array, "out in"], packing: Packing
) -> tuple[Int8[Array, "tokens groups size"], Int[Array, "groups tokens out"]]:
    """The tokens in groups, and the sums of each group."""
    if packing.groups == 1:
        # Without a batch axis, for which XLA would lay the matrix out anew on a CPU:
        # eight bits at 2048 x 2048 by 256 tokens took twice as long.
        over = (((1,), (1,)), ((), ()))
        sums = jax.lax.dot_general(x, centred, over, preferred_element_type=jnp.int32)
        return x[:, None], sums[None]
    x, centred = (_in_groups(codes, packing) for codes in (x, centred))
    over = (((2,), (2,)), ((1,), (1,)))
    sums = jax.lax.dot_general(x, centred, over, preferred_element_type=jnp.int32)
    return x, sums


def _centred(operands: Operands, packing: Packing) -> Int8[Array, "out in"]:
    codes = unpack_codes(operands.codes, packing.bits, packing.size)
    # Modulo 256, which is the number below zero once the bits are read as signed.
    return jax.lax.bitcast_convert_type(codes - jnp.uint8(packing.middle), jnp.int8)


def _in_groups(
    codes: Int8[Array, "rows in"], packing: Packing
) -> Int8[Array, "rows groups size"]:
    rows, size = codes.shape
    # There is more than one group, so they have a size.
    missing = packing.groups * (packing.group_size or size) - size
    codes = jnp.pad(codes, ((0, 0), (0, missing)))
    return codes.reshape(rows, packing.groups, -1)
