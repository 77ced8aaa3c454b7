from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ...internal import accumulator_dtype
from ._codes import unpack_codes


class Packing(NamedTuple):
    """How packed codes are to be read; hashable.

    - `bits`: of a code. What a code stands for is counted from $2^{b-1}$, or from the
        zero point of its group.
    - `size`: codes in a row.
    - `group_size`: neighbours in a row that share a scale, `None` for the whole row.
        The last group may be shorter.

    !!! example

        ```python
        packing = Packing(bits=4, size=100, group_size=32)
        packing.groups                                 # 4, the last one of 4 codes
        ```
    """

    bits: int
    size: int
    group_size: int | None = None

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return 1 if self.group_size is None else -(-self.size // self.group_size)

    @property
    def middle(self) -> int:
        """The code that stands for zero where there is no zero point."""
        return 2 ** (self.bits - 1)


def decode_codes(
    codes: UInt8[Array, "*rows bytes"],
    scale: Float[Array, "*steps groups"],
    zero: UInt8[Array, "*steps groups"] | None,
    packing: Packing,
) -> Float[Array, "*rows in"]:
    r"""The matrix that packed codes stand for, $\hat W = s\,(c - z)$.

    **Arguments:**

    - `codes`: as packed by `pack_codes`, `(*stack, out, bytes)`.
    - `scale`: of every group, `(*stack, rows, groups)`; one row serves all of them.
    - `zero`: the code that stands for zero, like `scale`; $2^{b-1}$ if not given.
    - `packing`: how to read the codes.

    **Returns:**

    `(*stack, out, in)`, in float32 or wider.

    !!! example

        ```python
        codes = pack_codes(jnp.array([[0, 3, 15]], jnp.uint8), 4)
        decode_codes(codes, jnp.full((1, 1), 0.5), None, Packing(4, 3))
        # [[-4.0, -2.5, 3.5]]
        ```
    """
    dtype = accumulator_dtype(scale.dtype)
    whole = unpack_codes(codes, packing.bits, packing.size).astype(dtype)
    if zero is None:
        steps = whole - packing.middle
    else:
        steps = whole - spread_groups(zero.astype(dtype), whole.shape, packing)
    return steps * spread_groups(scale.astype(dtype), whole.shape, packing)


def spread_groups(
    of_groups: Float[Array, "*steps groups"],
    shape: tuple[int, ...],
    packing: Packing,
) -> Float[Array, "*rows in"]:
    """The value of its group for every element of a matrix.

    !!! example

        ```python
        scale = jnp.array([[1.0, 2.0]])
        spread_groups(scale, (3, 5), Packing(4, 5, 3))   # rows of 1, 1, 1, 2, 2
        ```
    """
    if packing.group_size is None:
        return jnp.broadcast_to(of_groups, shape)
    each = jnp.repeat(of_groups, packing.group_size, axis=-1)[..., : packing.size]
    return jnp.broadcast_to(each, shape)
