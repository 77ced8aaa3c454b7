from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulator_dtype
from .._carry import start_of
from ._order import by_expert, rows_at


# Least and most rows of one product, which are about as many as a group has on average.
# Measured on CPU, all products by blocks, forward and backward: with 32 rows an expert
# of 768 x 64, 16 was a fifth faster than 32 and 64; with 8 rows 16 was the fastest, 64
# took twice as long; with 128 rows of 512 x 1024, 64 was the fastest, 16 took a fifth
# longer.
_LEAST, _MOST = 16, 64

# Up to this product of their sizes operands are widened first, which costs nothing
# there: jaxlib 0.7.2 crashes at some tiny products in bfloat16, such as 9 rows of 4
# with 4 x 3.
_TINY = 2**14


class _Blocks(NamedTuple):
    """Where to find the blocks of rows, none of which has rows of two groups."""

    order: Int[Array, " rows"]
    inverse: Int[Array, " rows"]
    starts: Int[Array, " groups_and_one"]
    count: Int[Array, ""]
    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    filled: Int[Array, " blocks"]
    size: int


def _blocks(group, groups, skipped=0) -> _Blocks:
    """Blocks of the rows of every group but the first `skipped` ones."""
    order, inverse, starts = by_expert(group, groups)
    rows = group.shape[0]
    size = _block_size(rows, groups)
    sizes = jnp.maximum(jnp.diff(starts) - skipped, 0)
    needed = -(-sizes // size)
    ends = jnp.cumsum(needed)
    block = jnp.arange(-(-rows // size) + min(groups, rows), dtype=jnp.int32)
    owner = jnp.sum(ends[None] <= block[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, groups - 1)
    within = (block - (ends - needed)[owner]) * size
    return _Blocks(
        order,
        inverse,
        starts,
        ends[-1],
        owner,
        starts[owner] + skipped + within,
        sizes[owner] - within,
        size,
    )


def _block_size(rows, groups) -> int:
    average = 1 << max(0, rows // groups - 1).bit_length()
    return max(1, min(max(_LEAST, min(average, _MOST)), rows))


def _product(equation, left, right):
    dtype = accumulator_dtype(left.dtype)
    if left.size * right.size <= _TINY:
        left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def matmul(
    rows: Float[Array, "rows d_in"],
    stacked: Float[Array, "groups ..."],
    group: Int[Array, " rows"],
    flipped: bool,
) -> Float[Array, "rows d_out"]:
    """The grouped product as a loop over blocks of rows of one group each."""
    blocks = _blocks(group, stacked.shape[0])
    dtype = accumulator_dtype(rows.dtype)
    d_out = stacked.shape[2 if flipped else 1]
    # What the last block may read too much is behind the rows.
    padded = jnp.pad(rows_at(rows, blocks.order), [(0, blocks.size), (0, 0)])
    equation = "ri,io->ro" if flipped else "ri,oi->ro"

    def add(index, y):
        weight = jax.lax.dynamic_index_in_dim(
            stacked, blocks.group[index], keepdims=False
        )
        block = jax.lax.dynamic_slice_in_dim(padded, blocks.start[index], blocks.size)
        block = _product(equation, block, weight)
        # A block that is not full reaches into the next group's, which comes later.
        return jax.lax.dynamic_update_slice_in_dim(y, block, blocks.start[index], 0)

    shape = (rows.shape[0] + blocks.size, d_out)
    y = start_of(None, shape, dtype, padded[:, :1], stacked[:1, :1, 0])
    y = rows_at(jax.lax.fori_loop(0, blocks.count, add, y), blocks.inverse)
    inside = blocks.inverse < blocks.starts[-1]
    return jnp.where(inside[:, None], y, jnp.zeros_like(y))


def outer(
    left: Float[Array, "rows d_left"],
    right: Float[Array, "rows d_right"],
    group: Int[Array, " rows"],
    groups: int,
) -> Float[Array, "groups d_left d_right"]:
    """The grouped outer product as a batched one, and a loop over what remains.

    The batched product has half as many places again as a group has rows on average;
    what finds none is added by blocks of rows of one group each. With 32 rows an
    expert of 768 x 64 the experts take 23 ms forward and backward so, 30 by blocks
    alone.
    """
    rows = left.shape[0]
    places = -(-3 * rows // (2 * groups))
    blocks = _blocks(group, groups, places)
    starts = blocks.starts

    def product(equation, row, there):
        # `rows` stands for nobody: reading there gives zeros.
        source = blocks.order.at[row].get(mode="clip")
        source = jnp.where(there, source, rows)
        pair = (
            jnp.take(x, source, axis=0, mode="fill", fill_value=0)
            for x in (left, right)
        )
        return _product(equation, *pair)

    def add(index, total):
        within = jnp.arange(blocks.size, dtype=jnp.int32)
        there = within < blocks.filled[index]
        block = product("ri,rj->ij", blocks.start[index] + within, there)
        own = blocks.group[index]
        old = jax.lax.dynamic_index_in_dim(total, own, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, old + block, own, 0)

    place = jnp.arange(places, dtype=jnp.int32)[None]
    there = place < jnp.diff(starts)[:, None]
    total = product("gri,grj->gij", starts[:-1, None] + place, there)
    return jax.lax.fori_loop(0, blocks.count, add, total)
