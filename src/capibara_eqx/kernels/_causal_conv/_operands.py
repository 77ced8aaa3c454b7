"""What a fused kernel of the causal convolution reads and writes.

Every fused backend is a module with three functions:

- `refusal(operands, dilation, silu)`: why it cannot serve them, or `None`;
- `forward(operands, dilation, silu)`: `y`;
- `backward(operands, dy, dilation, silu)`: the cotangents.
"""

import math
from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Operands(NamedTuple):
    """The arguments with one axis of rows, and one of groups of rows.

    Rows are cut into `groups` equal runs of neighbours; those of one run share the
    weights. As cotangents the fields have the same shapes and dtypes, but those of
    `weight` and `bias` have one entry a row, and `document` has none.
    """

    x: Float[Array, "rows seq channels"]
    weight: Float[Array, "groups channels width"]
    bias: Float[Array, "groups channels"] | None
    history: Float[Array, "rows reach channels"]
    document: Int[Array, "rows reach_and_seq"] | None


def pack(
    x: Float[Array, "*batch seq channels"],
    weight: Float[Array, "channels 1 width"],
    bias: Float[Array, " channels"] | None,
    history: Float[Array, "*batch reach channels"],
    document: Int[Array, "*batch reach_and_seq"] | None,
) -> Operands:
    """The arguments of a depthwise convolution as one group of rows."""
    count = math.prod(x.shape[:-2])

    def rows(values):
        return values.reshape(count, *values.shape[x.ndim - 2 :])

    return Operands(
        rows(x),
        weight[None, :, 0],
        None if bias is None else bias[None],
        rows(history),
        None if document is None else rows(document),
    )
