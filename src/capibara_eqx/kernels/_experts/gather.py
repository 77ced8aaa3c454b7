import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import reference
from ._operands import Operands, none_dropped, refuse_capacity, refuse_explicit


def experts(
    operands: Operands, activation: str, capacity_factor: float | None
) -> tuple[Float[Array, "tokens d_model"], Int[Array, ""]]:
    """`kernels.experts` as `reference`, some tokens after others.

    The work is that of the chosen experts, and nothing in it grows with their number
    but the gradient of the weights: for very many experts of very few rows, which no
    two tokens share. As many choices are gathered at once as there are experts, so the
    copies are never larger than the weights, unless one token has more choices than
    there are experts. Nor is there more than one sum into the weights' gradient for as
    many choices.
    """
    refuse_capacity(capacity_factor)
    refuse_explicit(operands)
    tokens, top_k = operands.indices.shape
    chunks = -(-tokens // max(1, operands.num_experts // top_k))
    size = -(-tokens // chunks)

    @jax.checkpoint
    def some(x, indices, weights):
        part = Operands(x, indices, weights, operands.stacked)
        return reference.experts(part, activation, None)[0]

    def in_chunks(x, fill):
        padding = [(0, chunks * size - tokens), (0, 0)]
        padded = jnp.pad(x, padding, constant_values=fill)
        return padded.reshape(chunks, size, x.shape[1])

    x, indices, weights = operands[:3]
    if chunks == 1:
        return some(x, indices, weights), none_dropped()
    parts = in_chunks(x, 0), in_chunks(indices, -1), in_chunks(weights, 0)
    y = jax.lax.map(lambda part: some(*part), parts)
    return y.reshape(chunks * size, -1)[:tokens], none_dropped()
