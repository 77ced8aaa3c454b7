import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate
from ._operands import Operands, gated, refuse_explicit, shifted
from ._order import by_expert


def experts(
    operands: Operands, activation: str, capacity_factor: float | None
) -> tuple[Float[Array, "tokens d_model"], Int[Array, ""]]:
    """`kernels.experts` with the same number of places at every expert.

    Shapes are fixed, and the products are batched ones of equal size. First choices
    are placed before second ones, and those of equal rank in the order of the tokens;
    what finds no place is dropped.
    """
    if capacity_factor is None:
        raise NotImplementedError(
            "needs a `capacity_factor`: every expert takes ceil(capacity_factor * "
            "top_k * tokens / experts) tokens"
        )
    refuse_explicit(operands)
    x, own, dtype = operands.x, operands.stacked, operands.dtype
    count, (tokens, top_k) = operands.num_experts, operands.indices.shape
    places = math.ceil(capacity_factor * top_k * tokens / count)
    places = min(places, top_k * tokens)

    by_rank = operands.indices.T.reshape(-1)
    order, inverse, starts = by_expert(by_rank, count)
    sizes = jnp.diff(starts)
    place = jnp.arange(places, dtype=jnp.int32)[None]
    queue, taken = starts[:-1, None] + place, place < sizes[:, None]
    # `tokens` stands for nobody: reading there gives zeros.
    source = jnp.where(taken, order.at[queue].get(mode="clip") % tokens, tokens)
    real = (by_rank >= 0) & (by_rank < count)
    expert = jnp.where(real, by_rank, 0)
    position = inverse - starts[expert]
    kept = real & (position < places)
    slot = jnp.where(kept, expert * places + position, count * places)

    seen = jnp.take(x, source, axis=0, mode="fill", fill_value=0)

    def product(equation, x, weight, bias):
        y = jnp.einsum(equation, x, weight, preferred_element_type=dtype)
        return shifted(y, None if bias is None else bias[:, None])

    inner = functools.partial(product, "ecd,efd->ecf", seen)
    ones = jnp.ones(taken.shape, dtype)
    hidden = gated(own, inner, ones, activation, x.dtype)
    y = product("ecf,edf->ecd", hidden, own.down, own.down_bias)
    y = jnp.take(y.reshape(count * places, -1), slot, axis=0, mode="fill", fill_value=0)
    weights = accumulate(operands.weights).T.reshape(-1, 1)
    y = jnp.sum((weights * y).reshape(top_k, tokens, -1), axis=0)
    return y.astype(x.dtype), jnp.sum(real & ~kept).astype(jnp.int32)
