"""What the ways to train with zeros share: masks in the state of an optimiser."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Int, PyTree

from ..internal import promote_dtypes
from ._places import Place, get, places, replace
from ._rules import Rule, choose
from ._unstructured import Groups


Masks = dict[str, Bool[Array, "..."]]
Update = Callable[..., tuple[PyTree, Any]]


class SparseTrainingState(NamedTuple):
    """The state of `rigl`, `set_training` and `magnitude_pruning`.

    - `count`: updates so far.
    - `masks`: by path, true where a weight may be other than zero.
    - `inner`: the state of the optimiser inside.
    """

    count: Int[Array, ""]
    masks: Masks
    inner: Any


def sparse_masks(state: PyTree) -> dict[str, Bool[Array, "..."]]:
    """The masks that sparse training keeps in the state of an optimiser.

    **Arguments:**

    - `state`: of an optimiser, as `optax.chain` or `optax.MultiSteps` nest it.

    **Returns:**

    By the path of each weight, true where it may be other than zero.

    **Raises:**

    `ValueError` if no part of the state is that of sparse training.

    !!! example

        ```python
        masks = sparse_masks(state)
        density = {path: mask.mean() for path, mask in masks.items()}
        ```
    """

    def ours(node):
        return isinstance(node, SparseTrainingState)

    for node in jax.tree.leaves(state, is_leaf=ours):
        if ours(node):
            return node.masks
    raise ValueError(
        "sparse_masks: `state` has no masks. Pass the state of an optimiser that "
        "`rigl`, `set_training` or `magnitude_pruning` made."
    )


class SparseWeight(NamedTuple):
    """A weight that a rule chose."""

    keys: tuple[Any, ...]
    value: Array
    groups: Groups


Weights = dict[str, SparseWeight]


def sparse_weights(function: str, params: PyTree, rules: Sequence[Rule]) -> Weights:
    """By path, the weights that the rules choose among the parameters."""
    if params is None:
        raise ValueError(
            f"{function}: `params` must be passed to `update` too, as in "
            "`optimizer.update(gradients, state, params)`."
        )
    found = places(params)
    weights = {place.path: place for place in found if place.is_matrix}
    others = [place.path for place in found if not place.is_matrix]
    chosen = choose(function, rules, weights, others)
    return {
        path: _weight(function, weights[path], rule)
        for path, rule in chosen.items()
        if rule.spec is not None
    }


def masked(tree: PyTree, weights: Weights, masks: Masks) -> PyTree:
    """Parameters or gradients with zeros where a weight has none."""

    def zeroed(path, weight):
        leaf = get(tree, weight.keys)
        return jnp.where(masks[path], leaf, jnp.zeros_like(leaf))

    new = {weight.keys: zeroed(path, weight) for path, weight in weights.items()}
    return replace(tree, new)


def masked_updates(updates: PyTree, weights: Weights, masks: Masks) -> PyTree:
    """Updates after which a weight is exactly zero where its mask is false."""

    def toward(path, weight):
        update = get(updates, weight.keys)
        # A narrower dtype could not hold what takes the weight to zero.
        dtype = promote_dtypes(update.dtype, weight.value.dtype)
        away = -weight.value.astype(dtype)
        return jnp.where(masks[path], update.astype(dtype), away)

    new = {weight.keys: toward(path, weight) for path, weight in weights.items()}
    return replace(updates, new)


def zero_moments(state: PyTree, params: PyTree, new: Mapping[Any, Array]) -> PyTree:
    """The state of an optimiser with zeros where weights are new.

    Moments lie in it at the path of their parameter, behind a path of their own, and
    have its shape.

    **Arguments:**

    - `state`: of the optimiser inside.
    - `params`: the parameters, whose paths are known by it.
    - `new`: by the keys of a weight, where it is new.
    """
    known = {keys for keys, _ in jtu.tree_flatten_with_path(params)[0]}

    def zeroed(path, leaf):
        for start in range(len(path) + 1):
            keys = path[start:]
            if keys in known:
                fresh = new.get(keys)
                if fresh is None or fresh.shape != jnp.shape(leaf):
                    return leaf
                return jnp.where(fresh, jnp.zeros_like(leaf), leaf)
        return leaf

    return jtu.tree_map_with_path(zeroed, state)


def sparse_transformation(
    inner: optax.GradientTransformation,
    choose_weights: Callable[[PyTree], Weights],
    first_masks: Callable[[Weights], Masks],
    step: Callable[..., tuple[PyTree, Masks, Any]],
) -> optax.GradientTransformationExtraArgs:
    """A transformation around `inner`, that keeps weights zero outside of masks.

    **Arguments:**

    - `inner`: what moves the weights that there are.
    - `choose_weights`: of parameters.
    - `first_masks`: of weights.
    - `step`: from the count of this update (the first is 1), gradients, masks, the
        state of `inner`, parameters, weights, and a function that makes a usual update
        under masks, to updates, masks and state.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        weights = choose_weights(params)
        masks = first_masks(weights)
        state = inner.init(masked(params, weights, masks))
        return SparseTrainingState(jnp.zeros((), jnp.int32), masks, state)

    def update(updates, state, params=None, **extra):
        weights = choose_weights(params)

        def descend(masks, inner_state):
            gradients = masked(updates, weights, masks)
            kept = masked(params, weights, masks)
            moved, inner_state = inner.update(gradients, inner_state, kept, **extra)
            return masked_updates(moved, weights, masks), inner_state

        count = state.count + 1
        parts = (count, updates, state.masks, state.inner, params, weights, descend)
        moved, masks, inner_state = step(*parts)
        return moved, SparseTrainingState(count, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _weight(function: str, place: Place, rule: Rule) -> SparseWeight:
    groups = Groups.of(function, place, rule.spec)
    return SparseWeight(place.keys, place.value, groups)
