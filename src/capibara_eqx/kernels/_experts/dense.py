import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate
from ._operands import (
    Operands,
    gated,
    mixing_matrix,
    none_dropped,
    refuse_capacity,
    shifted,
)


def experts(
    operands: Operands, activation: str, capacity_factor: float | None
) -> tuple[Float[Array, "tokens d_model"], Int[Array, ""]]:
    """`kernels.experts` as three products over all experts.

    The work and the memory are those of `experts` times as many tokens.
    """
    refuse_capacity(capacity_factor)
    x, own, dtype = operands.x, operands.stacked, operands.dtype
    mixing = mixing_matrix(operands)

    def product(equation, x, stacked):
        return jnp.einsum(equation, x, stacked, preferred_element_type=dtype)

    def inner(stacked, bias):
        return shifted(product("td,efd->tef", x, stacked), bias)

    hidden = gated(own, inner, mixing, activation, x.dtype)
    y = product("tef,edf->td", hidden, own.down)
    if own.down_bias is not None:
        y = y + mixing @ accumulate(own.down_bias)
    return y.astype(x.dtype), none_dropped()
