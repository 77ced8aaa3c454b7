"""Where the weights of a model lie, by path."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..arrays import AbstractWeight, LoRAArray, is_weight
from ..layers import (
    BitNet158,
    CompressedConv,
    Embedding,
    Linear,
    LoRALinear,
    MixtureOfRookies,
    MoE,
)


# The matrices of layers that are known; nothing else of theirs is one, whatever its
# axes: in a stack of layers a bias has two.
_MATRICES: Mapping[type, tuple[str, ...]] = {
    eqx.nn.Linear: ("weight",),
    eqx.nn.Embedding: ("weight",),
    eqx.nn.GRUCell: ("weight_ih", "weight_hh"),
    eqx.nn.LSTMCell: ("weight_ih", "weight_hh"),
    eqx.nn.Conv: ("weight",),
    eqx.nn.ConvTranspose: ("weight",),
    BitNet158: ("weight",),
    CompressedConv: ("matrix",),
    Linear: ("weight",),
    LoRALinear: ("weight",),
    Embedding: ("weight",),
    MoE: ("gate", "up", "down"),
    MixtureOfRookies: ("up", "down"),
}
_KNOWN = ("equinox", "capibara_eqx")


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter of a model, or a node that stands for one.

    - `path`: as rules name it.
    - `keys`: the way to it from the model.
    - `value`: the array or the node; that under the adapter, if there is one.
    - `holder`: the layer that it is a part of.
    - `is_matrix`: whether a node can stand in its place.
    - `adapter`: the one around it.
    """

    path: str
    keys: tuple[Any, ...]
    value: Any
    holder: Any
    is_matrix: bool
    adapter: LoRAArray | None = None

    @property
    def whole(self) -> Any:
        """What the layer holds: the value, or the adapter around it."""
        return self.value if self.adapter is None else self.adapter

    def around(self, value: Any) -> Any:
        """What the layer would hold with another value there."""
        if self.adapter is None:
            return value
        return eqx.tree_at(lambda node: node.base, self.adapter, value)


def places(model: PyTree) -> list[Place]:
    """Every floating point parameter, and every node that stands for one."""
    flat, _ = jtu.tree_flatten_with_path(model, is_leaf=is_weight)
    found = []
    for keys, value in flat:
        if not isinstance(value, AbstractWeight) and not eqx.is_inexact_array(value):
            continue
        holder = get(model, keys[:-1]) if keys else None
        path = path_of(model, keys)
        matrix = isinstance(value, AbstractWeight) or _is_matrix(keys, value, holder)
        place = Place(path, tuple(keys), value, holder, matrix)
        found.append(_under_adapter(place) if isinstance(value, LoRAArray) else place)
    return found


def get(model: PyTree, keys: Sequence[Any]) -> Any:
    """What lies in `model` at the end of a path of `jax.tree_util`."""
    for key in keys:
        if isinstance(key, jtu.GetAttrKey):
            model = getattr(model, key.name)
        elif isinstance(key, jtu.SequenceKey):
            model = model[key.idx]
        elif isinstance(key, jtu.DictKey):
            model = model[key.key]
        else:
            model = jax.tree.leaves(model, is_leaf=lambda x, m=model: x is not m)[
                key.key
            ]
    return model


def replace(model: PyTree, new: Mapping[tuple[Any, ...], Any]) -> PyTree:
    """The model with something else at the end of some paths."""
    if not new:
        return model
    return eqx.tree_at(
        lambda model: [get(model, keys) for keys in new],
        model,
        list(new.values()),
        is_leaf=lambda node: node is None,
    )


def as_matrix(weight: Array, place: Place) -> Array:
    """`(*stack, out, in)`: of a convolution a row holds the taps of a channel."""
    if not isinstance(place.holder, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return weight
    kernel = place.holder.num_spatial_dims + 1
    return weight.reshape(*weight.shape[:-kernel], -1)


def path_of(model: PyTree, keys: Sequence[Any]) -> str:
    """What it was called before a convolution around it was compressed."""
    names = []
    for i, key in enumerate(keys):
        name = jtu.keystr((key,), simple=True)
        inside = isinstance(get(model, keys[:i]), CompressedConv)
        if not inside:
            names.append(name)
        elif name == "matrix":
            names.append("weight")
    return "/".join(names)


def _under_adapter(place: Place) -> Place:
    """The weight that has the adapter, by its own name."""
    keys = (*place.keys, jtu.GetAttrKey("base"))
    base, adapter = place.value.base, place.value
    return Place(place.path, keys, base, place.holder, True, adapter)


def _is_matrix(keys, value, holder) -> bool:
    if value.ndim < 2:
        return False
    for kind, names in _MATRICES.items():
        if isinstance(holder, kind):
            return getattr(keys[-1], "name", None) in names
    return type(holder).__module__.split(".")[0] not in _KNOWN
