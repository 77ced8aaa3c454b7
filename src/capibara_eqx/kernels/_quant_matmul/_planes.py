"""A packed product without interleaving anything: one product a place in the byte.

The codes at one place of all bytes multiply every so-manieth input. So the tokens are
sorted by place, which costs little, and the codes stay as they are: to read them is to
shift and to mask. What is summed is scaled by group; codes count from the middle, and
the zero points are made up for by the sums of the tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Num

from ._decode import Packing
from ._operands import Operands, quantize_tokens


_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
# Within a chunk each group is a product of its own, of which the rest is zeros.
_GROUPS = 16


class Chunk(NamedTuple):
    """A part of the bytes of a row that is worked on at a time.

    - `span`: bytes.
    - `groups`: in it.
    - `chunks`: that a group stretches over, one if there are several groups in one.
    """

    span: int
    groups: int
    chunks: int


def refusal(operands: Operands, packing: Packing) -> str | None:
    """Why codes cannot be read by place, or numbers are not those of a kernel."""
    if 8 % packing.bits:
        return (
            f"codes of {packing.bits} bits are cut into parts that lie apart; kernels "
            "take 2, 4 and 8"
        )
    if packing.groups > 1 and _group_size(packing) % codes_a_byte(packing):
        return f"groups of {packing.group_size} codes begin within a byte"
    if 0 in (*operands.x.shape, *operands.codes.shape):
        return "there is nothing to multiply"
    for name in ("x", "scale"):
        dtype = getattr(operands, name).dtype
        if dtype not in _DTYPES:
            return f"`{name}` must be float32 or bfloat16, not {dtype}"
    return None


def chunk_refusal(packing: Packing, spans: tuple[int, ...]) -> str | None:
    """Why none of `spans` is a chunk for these groups, or `None`."""
    if chunk_for(packing, spans) is None:
        return (
            f"groups of {packing.group_size} codes of {packing.bits} bits neither fit "
            f"into chunks of {', '.join(map(str, spans))} bytes, {_GROUPS} at most in "
            "one, nor are made of them"
        )
    return None


def chunk_for(packing: Packing, spans: tuple[int, ...]) -> Chunk | None:
    """The chunk with the fewest groups, and of those the largest."""
    fits = [chunk for span in spans for chunk in _chunk_of(packing, span)]
    fits = [chunk for chunk in fits if chunk.groups <= _GROUPS]
    return min(fits, key=lambda chunk: (chunk.groups, -chunk.span), default=None)


def _chunk_of(packing: Packing, span: int) -> list[Chunk]:
    """The chunk of so many bytes, if there is one."""
    size, row = group_bytes(packing), row_bytes(packing)
    if span >= row:
        return [Chunk(span, packing.groups, 1)]
    if packing.groups == 1 or size % span == 0:
        return [Chunk(span, 1, -(-size // span))]
    return [Chunk(span, span // size, 1)] if span % size == 0 else []


def codes_a_byte(packing: Packing) -> int:
    return 8 // packing.bits


def row_bytes(packing: Packing) -> int:
    return -(-packing.size // codes_a_byte(packing))


def group_bytes(packing: Packing) -> int:
    """All bytes of a row if there is one group."""
    return min(row_bytes(packing), -(-_group_size(packing) // codes_a_byte(packing)))


def _group_size(packing: Packing) -> int:
    return packing.group_size or packing.size


def tokens_of(
    operands: Operands, activations: str | None
) -> tuple[Num[Array, "tokens in"], Float[Array, "tokens 1"] | None]:
    """What is multiplied, and the step by which to multiply the result, if any."""
    if activations is None:
        return operands.x, None
    return quantize_tokens(operands.x, operands.input_scale)


def by_place(
    x: Num[Array, "tokens in"], packing: Packing, span: int
) -> Num[Array, "places tokens width"]:
    """The inputs that the codes at each place multiply, zeros up to whole chunks."""
    tokens, size = x.shape
    places, width = codes_a_byte(packing), -(-row_bytes(packing) // span) * span
    x = jnp.pad(x, ((0, 0), (0, places * width - size)))
    return x.reshape(tokens, width, places).transpose(2, 0, 1)


def scale_by_chunk(
    operands: Operands, packing: Packing, chunk: Chunk
) -> Float[Array, "several groups out"]:
    """The scales of the groups of every chunk, or of several with one group."""
    scale = operands.scale.astype(jnp.float32).T
    scale = jnp.broadcast_to(scale, (packing.groups, operands.codes.shape[0]))
    missing = -packing.groups % chunk.groups
    scale = jnp.pad(scale, ((0, missing), (0, 0)))
    return scale.reshape(-1, chunk.groups, scale.shape[1])


def sums_of_groups(
    x: Num[Array, "tokens in"], packing: Packing, dtype: DTypeLike
) -> Num[Array, "tokens groups"]:
    """What the inputs of each group of a token add up to."""
    missing = packing.groups * _group_size(packing) - packing.size
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, missing)))
    return jnp.sum(x.reshape(len(x), packing.groups, -1), axis=-1)


def finished(
    y: Float[Array, "tokens out"],
    x: Num[Array, "tokens in"],
    step: Float[Array, "tokens 1"] | None,
    operands: Operands,
    packing: Packing,
) -> Float[Array, "tokens out"]:
    """The product, from that with codes that count from the middle."""
    if operands.zero is not None:
        exact = jnp.float32 if step is None else jnp.int32
        sums = sums_of_groups(x, packing, exact).astype(jnp.float32)
        shift = operands.zero.astype(jnp.float32) - packing.middle
        shift = shift * operands.scale.astype(jnp.float32)
        shift = jnp.broadcast_to(shift, (y.shape[1], packing.groups))
        y = y - jnp.einsum("tg,og->to", sums, shift, precision="highest")
    return y if step is None else y * jnp.broadcast_to(step, y.shape)


def decoded(codes, place, bits, dtype):
    """The codes at one place of bytes that are whole numbers of 32 bits."""
    code = (codes >> (bits * place)) & (2**bits - 1)
    # By way of float32, as of a TPU's own ways; whole numbers up to 128 are exact.
    steps = code - 2 ** (bits - 1)
    if dtype == jnp.int8:
        return steps.astype(jnp.int8)
    return steps.astype(jnp.float32).astype(dtype)


def only_group(x, lane, group, size):
    """`x`, and zeros where the byte is of another group."""
    wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    inside = (lane >= group * size) & (lane < (group + 1) * size)
    wider = x.astype(wide)
    return jnp.where(inside, wider, jnp.zeros_like(wider)).astype(x.dtype)


def dot(x, codes):
    """Over the last axis of both."""
    return lax.dot_general(
        x,
        codes,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
        # Products of 16 bits are exact as they are.
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )
