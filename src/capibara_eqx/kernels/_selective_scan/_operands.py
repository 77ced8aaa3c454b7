"""What a fused kernel of the selective scan reads, writes and keeps for its backward.

Every fused backend is a module with three functions:

- `refusal(operands, sizes)`: why it cannot serve such operands (a string), or `None`;
- `forward(operands, softplus, sizes, save)`: `(y, final_state, saved)`, where `saved`
  are the states that enter each chunk of `sizes.chunk` tokens, or `None` unless `save`;
- `backward(operands, saved, dy, dfinal_state, softplus, sizes)`: the cotangents.
"""

import math
from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from ...internal import accumulator_dtype


class Operands(NamedTuple):
    """The arguments of the scan with one axis of rows, and one of groups of rows.

    Rows are cut into `groups` equal runs of neighbours; those of one run share the
    weights `A`, `D` and `delta_bias`. An ordinary call has one group; `vmap` over the
    weights makes more. Streams keep their own dtype; `A`, `D`, `delta_bias` and
    `initial_state` are in the accumulator's.

    As cotangents the fields have the same shapes and dtypes, but those of `A`, `D` and
    `delta_bias` have one entry a row, `(rows, ...)`, in the accumulator's dtype: the
    sum over rows is taken outside, in an order that does not change.
    """

    u: Float[Array, "rows seq d_inner"]
    delta: Float[Array, "rows seq d_inner"]
    A: Float[Array, "groups d_inner d_state"]
    B: Float[Array, "rows seq d_state"]
    C: Float[Array, "rows seq d_state"]
    D: Float[Array, "groups d_inner"] | None
    z: Float[Array, "rows seq d_inner"] | None
    delta_bias: Float[Array, "groups d_inner"] | None
    initial_state: Float[Array, "rows d_inner d_state"] | None
    reset: Bool[Array, "rows seq"] | None


def saved_shape(operands: Operands, chunk: int) -> tuple[int, int, int, int]:
    """Shape of the saved states: `(rows, chunks, d_state, d_inner)`."""
    rows, seq, d_inner = operands.u.shape
    return rows, -(-seq // chunk), operands.A.shape[-1], d_inner


def pack(
    u: Float[Array, "*batch seq d_inner"],
    delta: Float[Array, "*batch seq d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, "*batch seq d_state"],
    C: Float[Array, "*batch seq d_state"],
    D: Float[Array, " d_inner"] | None,
    z: Float[Array, "*batch seq d_inner"] | None,
    delta_bias: Float[Array, " d_inner"] | None,
    initial_state: Float[Array, "*batch d_inner d_state"] | None,
    reset: Bool[Array, "*batch seq"] | None,
) -> Operands:
    """The arguments of `kernels.selective_scan` as one group of rows."""
    dtype = accumulator_dtype(u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype)
    if initial_state is not None:
        dtype = accumulator_dtype(dtype, initial_state.dtype)
        initial_state = initial_state.astype(dtype)
    count = math.prod(u.shape[:-2])

    def rows(x):
        return x.reshape(count, *x.shape[u.ndim - 2 :])

    def weights(x):
        return x.astype(dtype)[None]

    return Operands(
        u=rows(u),
        delta=rows(delta),
        A=weights(A),
        B=rows(B),
        C=rows(C),
        D=None if D is None else weights(D),
        z=None if z is None else rows(z),
        delta_bias=None if delta_bias is None else weights(delta_bias),
        initial_state=None if initial_state is None else rows(initial_state),
        reset=None if reset is None else rows(reset),
    )
