import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..arrays import as_array
from ..internal import accumulate, activate
from ..layers import MoE, Routing
from ..layers._glu import GATES
from ._tally import AbstractTally


class ObservedMoE(MoE):
    """A mixture of experts that shows what comes into the maps of each expert.

    The kernel of the layer computes the output; beside it, what an expert sees is
    computed once more, one expert after the other, so that the inputs of all of them
    never lie in memory together.
    """

    tallies: dict[str, AbstractTally]

    def __init__(self, layer: MoE, tallies: Mapping[str, AbstractTally]):
        """**Arguments:**

        - `layer`: the mixture.
        - `tallies`: by the name of the weight, `"gate"`, `"up"` or `"down"`, with an
            axis for the experts.
        """
        for field in dataclasses.fields(layer):
            setattr(self, field.name, getattr(layer, field.name))
        self.tallies = dict(tallies)

    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch d_model"], Routing]:
        """As the mixture itself."""
        y, routing = super().__call__(x, mask=mask, key=key)
        tokens = jax.lax.stop_gradient(x).reshape(-1, self.d_model)
        chosen = routing.indices.reshape(-1, self.top_k)

        def watch(y, expert):
            index, maps, tallies = expert
            return self._watch(y, tokens, jnp.any(chosen == index, -1), maps, tallies)

        maps = {
            name: None if getattr(self, name) is None else as_array(getattr(self, name))
            for name in ("gate", "up", "gate_bias", "up_bias")
        }
        index = jnp.arange(self.num_experts, dtype=chosen.dtype)
        y, _ = jax.lax.scan(watch, y, (index, maps, self.tallies))
        return y, routing

    def _watch(
        self,
        y: Float[Array, "*batch d_model"],
        tokens: Float[Array, "tokens d_model"],
        present: Bool[Array, " tokens"],
        maps: dict[str, Any],
        tallies: dict[str, AbstractTally],
    ) -> tuple[Float[Array, "*batch d_model"], None]:
        x = jnp.where(present[:, None], tokens, jnp.zeros_like(tokens))
        for name in ("gate", "up"):
            if name in tallies:
                y = tallies[name].watch(y, x, present)
        if "down" in tallies:
            gate = _affine(maps["gate"], maps["gate_bias"], x)
            hidden = activate(GATES[self.activation], gate)
            hidden = hidden * _affine(maps["up"], maps["up_bias"], x)
            hidden = jnp.where(present[:, None], hidden, jnp.zeros_like(hidden))
            y = tallies["down"].watch(y, hidden, present)
        return y, None


def _affine(
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None,
    x: Float[Array, "tokens in"],
) -> Float[Array, "tokens out"]:
    x = accumulate(x)
    y = x @ weight.astype(x.dtype).T
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
