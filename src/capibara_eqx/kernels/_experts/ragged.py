import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate
from ._grouped import grouped_matmul
from ._operands import Operands, gated, none_dropped, refuse_capacity, refuse_explicit


def experts(
    operands: Operands, activation: str, capacity_factor: float | None
) -> tuple[Float[Array, "tokens d_model"], Int[Array, ""]]:
    """`kernels.experts` as products of rows that are grouped by their expert.

    The work is that of the chosen experts alone, and nothing is dropped.
    """
    refuse_capacity(capacity_factor)
    refuse_explicit(operands)
    x, own, dtype = operands.x, operands.stacked, operands.dtype
    tokens, top_k = operands.indices.shape
    expert = operands.indices.reshape(-1)
    inside = (expert >= 0) & (expert < operands.num_experts)
    weights = jnp.where(inside, accumulate(operands.weights).reshape(-1), 0)

    def product(rows, stacked, bias):
        y = grouped_matmul(rows, stacked, expert)
        if bias is None:
            return y
        return y + jnp.take(bias.astype(dtype), expert, axis=0, mode="clip")

    rows = jnp.broadcast_to(x[:, None], (tokens, top_k, x.shape[-1]))
    rows = rows.reshape(tokens * top_k, -1)
    inner = functools.partial(product, rows)
    y = product(gated(own, inner, weights, activation, x.dtype), own.down, None)
    if own.down_bias is not None:
        bias = jnp.take(accumulate(own.down_bias), expert, axis=0, mode="clip")
        y = y + weights[:, None] * bias
    y = jnp.sum(y.reshape(tokens, top_k, -1), axis=1)
    return y.astype(x.dtype), none_dropped()
