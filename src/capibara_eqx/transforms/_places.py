"""Where the weights of a model lie, by path."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..arrays import AbstractWeight, is_weight
from ..layers import BitNet158, CompressedConv, Embedding, Linear, MoE


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
    Embedding: ("weight",),
    MoE: ("gate", "up", "down"),
}
_KNOWN = ("equinox", "capibara_eqx")


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter of a model, or a node that stands for one.

    - `path`: as rules name it.
    - `keys`: the way to it from the model.
    - `value`: the array or the node.
    - `holder`: what it is a part of.
    - `is_matrix`: whether a node can stand in its place.
    """

    path: str
    keys: tuple[Any, ...]
    value: Any
    holder: Any
    is_matrix: bool


def places(model: PyTree) -> list[Place]:
    """Every floating point parameter, and every node that stands for one."""
    flat, _ = jtu.tree_flatten_with_path(model, is_leaf=is_weight)
    found = []
    for keys, value in flat:
        if not isinstance(value, AbstractWeight) and not eqx.is_inexact_array(value):
            continue
        holder = get(model, keys[:-1]) if keys else None
        path = _path(model, keys)
        matrix = isinstance(value, AbstractWeight) or _is_matrix(keys, value, holder)
        found.append(Place(path, tuple(keys), value, holder, matrix))
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


def _path(model, keys) -> str:
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


def _is_matrix(keys, value, holder) -> bool:
    if value.ndim < 2:
        return False
    for kind, names in _MATRICES.items():
        if isinstance(holder, kind):
            return getattr(keys[-1], "name", None) in names
    return type(holder).__module__.split(".")[0] not in _KNOWN
