import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def by_expert(
    expert: Int[Array, " rows"], num_experts: int
) -> tuple[Int[Array, " rows"], Int[Array, " rows"], Int[Array, " experts_and_one"]]:
    """The rows sorted by their expert, those of none (an id outside) last.

    **Returns:**

    `(order, inverse, starts)`: the row at each place, the place of each row, and the
    place at which each expert's rows start, after the last where they end.
    """
    outside = (expert < 0) | (expert >= num_experts)
    expert = jnp.where(outside, num_experts, expert).astype(jnp.int32)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    places = jnp.arange(expert.shape[0], dtype=order.dtype)
    inverse = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32)
    starts = jnp.sum(expert[:, None] < bounds[None], axis=0, dtype=jnp.int32)
    return order, inverse, starts


def rows_at(
    x: Shaped[Array, "rows width"], order: Int[Array, " kept"]
) -> Shaped[Array, "kept width"]:
    """Some rows of `x` in another order, which names none of them twice."""
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)
