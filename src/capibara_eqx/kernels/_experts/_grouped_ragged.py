import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulator_dtype
from ._order import by_expert, rows_at


def matmul(
    rows: Float[Array, "rows d_in"],
    stacked: Float[Array, "groups ..."],
    group: Int[Array, " rows"],
    flipped: bool,
) -> Float[Array, "rows d_out"]:
    """The grouped product by XLA's own, on rows sorted by group."""
    order, inverse, starts = by_expert(group, stacked.shape[0])
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (1 if flipped else 2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    y = jax.lax.ragged_dot_general(
        rows_at(rows, order),
        stacked,
        jnp.diff(starts),
        numbers,
        preferred_element_type=accumulator_dtype(rows.dtype),
    )
    # What it holds behind the last group is not said anywhere.
    inside = inverse < starts[-1]
    return jnp.where(inside[:, None], rows_at(y, inverse), jnp.zeros_like(y))


def outer(
    left: Float[Array, "rows d_left"],
    right: Float[Array, "rows d_right"],
    group: Int[Array, " rows"],
    groups: int,
) -> Float[Array, "groups d_left d_right"]:
    """The grouped outer product by XLA's own, on rows sorted by group."""
    order, _, starts = by_expert(group, groups)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        rows_at(left, order),
        rows_at(right, order),
        jnp.diff(starts),
        numbers,
        preferred_element_type=accumulator_dtype(left.dtype),
    )
