"""What comes into the weights of a model, added up over batches."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Integer, PyTree

from ..arrays import AbstractWeight, apply_weight, as_array
from ..internal import accumulator_dtype
from ..layers import CompressedConv, MoE
from ._observed_experts import ObservedMoE
from ._places import Place, get, places, replace
from ._rules import Rule, choose
from ._tally import AbstractTally


Tally = TypeVar("Tally", bound=AbstractTally)
_CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose, CompressedConv)


class _Observed(AbstractWeight):
    """A weight that computes as before, and shows what it is multiplied by."""

    weight: Float[Array, "*stack out in"] | AbstractWeight
    tally: AbstractTally
    dtype: jnp.dtype = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dense(self) -> Float[Array, "*stack out in"]:
        return as_array(self.weight).astype(self.dtype)

    def rows(self, index: Integer[Array, "*batch"]) -> Float[Array, "*batch in"]:
        return self.weight[index].astype(self.dtype)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_weight(self.weight, self.tally.watch(x, x))


def observe(
    function: str,
    model: PyTree,
    forward: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    rules: Sequence[Rule] | Sequence[str],
    zeros: Callable[[tuple[int, ...], int, DTypeLike], Tally],
) -> tuple[dict[str, Tally], dict[str, tuple[int, ...]]]:
    """The tallies of the weights that `rules` choose, over all batches.

    `zeros` makes one of the axes in front of a weight, the width of its input, and the
    dtype of sums. Also returns the axes in front of weights whose inputs cannot be
    seen, those that convolve.
    """
    seen = _chosen(function, model, rules)
    hidden = {
        place.path: place.value.shape[: place.value.ndim - _kernel_axes(place)]
        for place in seen
        if isinstance(place.holder, _CONVOLUTIONS)
    }
    watched = [place for place in seen if place.path not in hidden]
    total = {
        place.path: zeros(
            place.value.shape[:-2],
            place.value.shape[-1],
            accumulator_dtype(place.value.dtype),
        )
        for place in watched
    }

    @eqx.filter_jit
    def added(model, total, batch):
        empty = jax.tree.map(jnp.zeros_like, total)
        sums = jax.grad(
            lambda tallies: _output(
                function, forward(_observed(model, watched, tallies), batch)
            )
        )(empty)
        return jax.tree.map(jnp.add, total, sums)

    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        total = added(model, total, batch)
    if not count:
        raise ValueError(
            f"{function}: `batches` must give at least one batch, got none. Has an "
            "iterator been read before?"
        )
    return total, hidden


def _chosen(function, model, rules) -> list[Place]:
    if isinstance(rules, str):
        raise ValueError(
            f"{function}: `rules` must be a list of rules or patterns, got {rules!r}. "
            f"Pass [{rules!r}]."
        )
    # Of a pattern alone it does not matter what becomes of the weight.
    rules = [rule if isinstance(rule, Rule) else Rule(rule, ...) for rule in rules]
    found = places(model)
    weights = {place.path: place for place in found if place.is_matrix}
    others = [place.path for place in found if not place.is_matrix]
    chosen = choose(function, rules, weights, others)
    return [weights[path] for path, rule in chosen.items() if rule.spec is not None]


def _kernel_axes(place: Place) -> int:
    if isinstance(place.holder, CompressedConv):
        return 2
    return place.holder.num_spatial_dims + 2


def _observed(model, watched, tallies) -> PyTree:
    """The model with nodes that watch, and layers where weights cannot be nodes."""
    nodes, experts = {}, {}
    for place in watched:
        tally = tallies[place.path]
        if isinstance(place.holder, MoE):
            experts.setdefault(place.keys[:-1], {})[place.keys[-1].name] = tally
        else:
            dtype = jnp.dtype(place.value.dtype)
            weight = get(model, place.keys)
            nodes[place.keys] = _Observed(weight=weight, tally=tally, dtype=dtype)
    model = replace(model, nodes)
    layers = {keys: ObservedMoE(get(model, keys), experts[keys]) for keys in experts}
    return replace(model, layers)


def _output(function, result) -> Float[Array, ""]:
    """Anything that depends on all that `forward` computes."""
    leaves = [leaf for leaf in jax.tree.leaves(result) if eqx.is_inexact_array(leaf)]
    if not leaves:
        raise ValueError(
            f"{function}: `forward(model, batch)` must return what the model computes, "
            "arrays of floating point numbers; it returned none. Return the output or "
            "the loss."
        )
    total = jnp.zeros(())
    for leaf in leaves:
        total = total + jnp.sum(jnp.real(leaf)).astype(total.dtype)
    return total
