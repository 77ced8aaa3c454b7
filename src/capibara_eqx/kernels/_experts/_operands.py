from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate, accumulator_dtype, activate


class Stacked(NamedTuple):
    """The parameters of all experts, in the layout of `layers.Linear`."""

    gate: Float[Array, "experts d_ff d_model"]
    up: Float[Array, "experts d_ff d_model"] | None
    down: Float[Array, "experts d_model d_ff"]
    gate_bias: Float[Array, "experts d_ff"] | None
    up_bias: Float[Array, "experts d_ff"] | None
    down_bias: Float[Array, "experts d_model"] | None


class Operands(NamedTuple):
    """What every backend takes: flat tokens, weights of experts in the dtype of `x`."""

    x: Float[Array, "tokens d_model"]
    indices: Int[Array, "tokens top_k"]
    weights: Float[Array, "tokens top_k"]
    stacked: Stacked

    @property
    def num_experts(self) -> int:
        return self.stacked.gate.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the sums and of what lies between two products."""
        return accumulator_dtype(self.x.dtype)


def refuse_capacity(capacity_factor: float | None) -> None:
    """Raise `NotImplementedError` if there is a capacity: nothing is dropped here."""
    if capacity_factor is not None:
        raise NotImplementedError(
            "drops no token, so there is no use for `capacity_factor`; leave it out, "
            "or use 'capacity'"
        )


def refuse_explicit(operands: Operands) -> None:
    """Raise `NotImplementedError` if the type of an operand says how it is sharded."""
    for x in jax.tree.leaves(operands):
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            raise NotImplementedError(
                "does not sort arrays that are sharded along an Explicit axis; call "
                "it inside `jax.shard_map`, or use 'scan' or 'dense'"
            )


def none_dropped() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


def mixing_matrix(operands: Operands) -> Float[Array, "tokens experts"]:
    """The weight of every expert for every token, zero for those not chosen."""
    chosen = jax.nn.one_hot(
        operands.indices, operands.num_experts, dtype=operands.dtype
    )
    return jnp.einsum("tke,tk->te", chosen, accumulate(operands.weights))


def shifted(
    y: Float[Array, "*rows width"], bias: Float[Array, "..."] | None
) -> Float[Array, "*rows width"]:
    """`y` plus a bias that broadcasts to it, or `y`."""
    if bias is None:
        return y
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def gated(
    own: Stacked,
    product: Callable[[Array, Array | None], Float[Array, "*rows d_ff"]],
    weight: Float[Array, "*rows"],
    activation: str,
    dtype: jnp.dtype,
) -> Float[Array, "*rows d_ff"]:
    """What goes into the last product, already weighted: it is the narrowest place.

    `product` takes a matrix and a bias of every expert, and gives what they make of
    each row. Experts of two matrices have no `up`.
    """
    hidden = activate(activation, product(own.gate, own.gate_bias))
    if own.up is not None:
        hidden = hidden * product(own.up, own.up_bias)
    return (hidden * weight.astype(hidden.dtype)[..., None]).astype(dtype)
