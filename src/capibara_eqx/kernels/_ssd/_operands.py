"""What a fused kernel of the dual reads, writes and keeps for its backward.

A fused backend is a module with three functions:

- `refusal(operands)`: why it cannot serve such operands (a string), or `None`;
- `forward(operands, chunk, save)`: `(y, final_state, saved)`, where `saved` are the
  states that enter each chunk of tokens, or `None` unless `save`;
- `backward(operands, chunk, saved, dy, dfinal_state)`: the cotangents.
"""

import math
from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from ...internal import accumulator_dtype


# Measured on a CPU, gradients: 16 tokens take 1.2 times as long, 32 are no faster.
_CHUNK = 64


class Operands(NamedTuple):
    """The arguments of the dual with one axis of rows.

    Streams keep their own dtype; decays, coefficient and state have the accumulator's.
    As cotangents the fields have the same shapes and dtypes.
    """

    x: Float[Array, "rows seq n_heads head_dim"]
    log_decay: Float[Array, "rows seq n_heads"]
    B: Float[Array, "rows seq n_groups d_state"]
    C: Float[Array, "rows seq n_groups d_state"]
    coefficient: Float[Array, "rows seq n_heads"] | None
    initial_state: Float[Array, "rows n_heads head_dim d_state"] | None
    reset: Bool[Array, "rows seq"] | None


def state_shape(operands: Operands) -> tuple[int, int, int, int]:
    """Shape of the state: `(rows, n_heads, head_dim, d_state)`."""
    rows, _, n_heads, head_dim = operands.x.shape
    return rows, n_heads, head_dim, operands.B.shape[-1]


def tokens_of_chunk(operands: Operands, chunk_size: int | None) -> int:
    """How many tokens a chunk has, no more than there are."""
    return min(chunk_size or _CHUNK, operands.x.shape[1])


def saved_shape(operands: Operands, chunk: int) -> tuple[int, int, int, int, int]:
    """Shape of the saved states: `(rows, chunks, n_heads, head_dim, d_state)`."""
    rows, n_heads, head_dim, d_state = state_shape(operands)
    return rows, -(-operands.x.shape[1] // chunk), n_heads, head_dim, d_state


def pack(
    x: Float[Array, "*batch seq n_heads head_dim"],
    log_decay: Float[Array, "*batch seq n_heads"],
    B: Float[Array, "*batch seq n_groups d_state"],
    C: Float[Array, "*batch seq n_groups d_state"],
    coefficient: Float[Array, "*batch seq n_heads"] | None,
    initial_state: Float[Array, "*batch n_heads head_dim d_state"] | None,
    reset: Bool[Array, "*batch seq"] | None,
) -> Operands:
    """The arguments of `kernels.ssd` as rows."""
    streams = [v.dtype for v in (x, log_decay, B, C)]
    optional = [v.dtype for v in (coefficient, initial_state) if v is not None]
    dtype = accumulator_dtype(*streams, *optional)
    batch = x.ndim - 3
    count = math.prod(x.shape[:batch])

    def rows(v):
        return v.reshape(count, *v.shape[batch:])

    return Operands(
        rows(x),
        rows(log_decay).astype(dtype),
        rows(B),
        rows(C),
        None if coefficient is None else rows(coefficient).astype(dtype),
        None if initial_state is None else rows(initial_state).astype(dtype),
        None if reset is None else rows(reset),
    )
