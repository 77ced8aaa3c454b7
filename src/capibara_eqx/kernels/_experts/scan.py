import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate
from .._carry import start_of
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
    """`kernels.experts` as a loop over the experts, every token through each.

    The work is that of `dense`. What lies inside an expert is computed again going
    backward, so that the memory is that of one expert.
    """
    refuse_capacity(capacity_factor)
    x, dtype = operands.x, operands.dtype

    def product(x, weight):
        return jnp.einsum("ti,oi->to", x, weight, preferred_element_type=dtype)

    @jax.checkpoint
    def weighted(own, share):
        def inner(weight, bias):
            return shifted(product(x, weight), bias)

        y = product(gated(own, inner, share, activation, x.dtype), own.down)
        if own.down_bias is not None:
            y = y + share[:, None] * accumulate(own.down_bias)[None]
        return y

    shares = mixing_matrix(operands)
    entering = (x, shares[:, :1], operands.stacked.down[0, :, 0])
    start = start_of(None, x.shape, dtype, *entering)
    y, _ = jax.lax.scan(
        lambda y, expert: (y + weighted(*expert), None),
        start,
        (operands.stacked, shares.T),
    )
    return y.astype(x.dtype), none_dropped()
