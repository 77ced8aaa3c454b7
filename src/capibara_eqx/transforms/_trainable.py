from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..arrays import AffineArray, FakeQuantArray, LoRAArray, TernaryArray, is_weight
from ._places import path_of, places
from ._rules import Rule, choose


def trainable_spec(model: PyTree, also: Sequence[str] = ()) -> PyTree:
    """Which parts of a model learn: the filter for `equinox.partition`.

    In a model with adapters (`transforms.lora`) these alone. In every other one each
    floating point array but the steps of weights that are kept as codes, and those of
    inputs. Codes themselves are whole numbers, of which there is no gradient.

    **Arguments:**

    - `model`: any PyTree.
    - `also`: regular expressions, as in a `Rule`, for what learns beside adapters, such
        as `".*norm.*"` or `"head/.*"`. Of a weight that has an adapter the weight
        itself learns then too.

    **Returns:**

    A PyTree of booleans, true for every array that learns.

    **Raises:**

    `ValueError` for a pattern that matches nothing, or a weight that is kept as codes,
    and for patterns where all of the model learns anyway.

    !!! example

        ```python
        learns, rest = eqx.partition(model, trainable_spec(model))
        grads = jax.grad(lambda p: loss(eqx.combine(p, rest)))(learns)
        ```
    """
    adapted = any(place.adapter is not None for place in places(model))
    chosen = _chosen(model, also, adapted)

    def learns(keys, node):
        whole = not adapted or path_of(model, keys) in chosen
        if not isinstance(node, LoRAArray):
            return _mask(node, whole)
        return _mask_adapter(node, whole)

    return jtu.tree_map_with_path(learns, model, is_leaf=is_weight)


def _mask(node: Any, learns: bool) -> PyTree:
    """True for the arrays of a node that can learn."""
    if not learns or isinstance(node, AffineArray | TernaryArray):
        return jax.tree.map(lambda _: False, node)
    mask = jax.tree.map(eqx.is_inexact_array, node)
    if isinstance(node, FakeQuantArray) and node.input_scale is not None:
        # No gradient moves it, but weight decay would.
        return eqx.tree_at(lambda mask: mask.input_scale, mask, False)
    return mask


def _mask_adapter(node: LoRAArray, base_learns: bool) -> PyTree:
    parts = ["a", "b"] if node.magnitude is None else ["a", "b", "magnitude"]
    return eqx.tree_at(
        lambda node: [node.base, *(getattr(node, part) for part in parts)],
        jax.tree.map(lambda _: False, node),
        [_mask(node.base, base_learns), *(True for _ in parts)],
    )


def _chosen(model: PyTree, also: Sequence[str], adapted: bool) -> set[str]:
    """The paths that one of the patterns matches."""
    if isinstance(also, str):
        raise ValueError(
            f"trainable_spec: `also` must be a list of patterns, got {also!r}. Pass "
            f"[{also!r}]."
        )
    if not also:
        return set()
    if not adapted:
        raise ValueError(
            "trainable_spec: `also` names what learns beside adapters, and `model` has "
            "none: all of it learns. Add adapters with `lora`, or leave `also` out."
        )
    found = {place.path: place for place in places(model)}
    rules = [Rule(pattern, None) for pattern in also]
    chosen = choose("trainable_spec", rules, found)
    for path in chosen:
        if isinstance(found[path].value, AffineArray | TernaryArray):
            raise ValueError(
                f"trainable_spec: {path!r} is kept as codes, which do not learn. Leave "
                "it out of `also`, or undo it with `dequantize` first."
            )
    return set(chosen)
