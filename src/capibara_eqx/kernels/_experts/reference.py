import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate
from ._operands import (
    Operands,
    gated,
    none_dropped,
    refuse_capacity,
    refuse_explicit,
    shifted,
)


def experts(
    operands: Operands, activation: str, capacity_factor: float | None
) -> tuple[Float[Array, "tokens d_model"], Int[Array, ""]]:
    """The definition of `kernels.experts`: every token gathers its experts' weights.

    A copy of the weights for every token: for small shapes.
    """
    refuse_capacity(capacity_factor)
    refuse_explicit(operands)
    x, own = operands.x, operands.stacked
    dtype, count = operands.dtype, operands.num_experts
    # A negative index would count from the end.
    indices = jnp.where(operands.indices < 0, count, operands.indices)
    weights = jnp.where(indices < count, accumulate(operands.weights), 0)

    def chosen(stacked):
        return jnp.take(stacked, indices, axis=0, mode="fill", fill_value=0)

    def product(equation, x, stacked, bias):
        stacked = chosen(stacked)
        y = jnp.einsum(equation, x, stacked, preferred_element_type=dtype)
        return shifted(y, None if bias is None else chosen(bias))

    inner = functools.partial(product, "td,tkfd->tkf", x)
    hidden = gated(own, inner, weights, activation, x.dtype)
    y = product("tkf,tkdf->tkd", hidden, own.down, None)
    if own.down_bias is not None:
        y = y + weights[..., None] * accumulate(chosen(own.down_bias))
    return jnp.sum(y, axis=1).astype(x.dtype), none_dropped()
