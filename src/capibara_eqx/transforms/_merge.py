import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..arrays import (
    AbstractWeight,
    AffineArray,
    FakeQuantArray,
    LoRAArray,
    SparseArray,
    TernaryArray,
    as_array,
    recompress,
)
from ..internal import accumulate
from ..layers import CompressedConv
from ._places import Place, as_matrix, places, replace


_FORMS = AffineArray | TernaryArray | SparseArray | FakeQuantArray


def merge(model: PyTree, requantize: bool = False) -> PyTree:
    r"""The model with adapters added to their weights, $W + s\,B A$, as plain arrays.

    A weight that was compressed is a plain array too afterwards: rounded to the steps
    of a few bits again, an update that is smaller than half of a step is lost, which
    that of a short training is. `requantize` does so all the same; `report(small,
    merge(model))` measures what is left.

    **Arguments:**

    - `model`: any PyTree.
    - `requantize`: whether weights that were compressed are again, on the same steps.

    **Returns:**

    The model, with its structure before `lora`. Keep the one with adapters for
    `unmerge`.

    **Raises:**

    `ValueError` if the model has no adapter.

    !!! example

        ```python
        plain = merge(model)
        ```
    """
    adapted = _adapted("merge", model)
    new = {}
    for place, adapter in adapted:
        weight = adapter.dense()
        if requantize and isinstance(adapter.base, _FORMS):
            new[place.keys[:-1]] = recompress(weight, adapter.base)
        elif isinstance(place.holder, CompressedConv):
            whole = eqx.tree_at(lambda conv: conv.matrix, place.holder, adapter)
            new[place.keys[:-2]] = whole.restored()
        else:
            new[place.keys[:-1]] = weight
    return replace(model, new)


def unmerge(merged: PyTree, adapted: PyTree) -> PyTree:
    r"""The model with adapters again, on what is left of its weights without them.

    $$W = W' - s\,B A$$

    in the form that the weight had before, on the same steps; with DoRA $W'$ gets the
    lengths that its rows had first. All that has no adapter is that of `merged`, so
    that a model which learned on after `merge` keeps what it learned:
    `unmerge(merge(model), model)` is `model` but for rounding.

    **Arguments:**

    - `merged`: what `merge` made, its weights changed since or not.
    - `adapted`: the model that it was made of.

    **Returns:**

    The model, with the structure of `adapted`.

    **Raises:**

    `ValueError` if `adapted` has no adapter, or `merged` no weight of its shape.

    !!! example

        ```python
        model, _ = lora(model, [Rule(".*in_proj/weight", LoRA(4))], key=key)
        again = unmerge(merge(model), model)
        ```
    """
    targets = {place.path: place for place in places(merged)}
    new = {}
    for place, adapter in _adapted("unmerge", adapted):
        target = targets.get(place.path)
        weight = _weight(place, target)
        base = _without_update(adapter, weight).astype(adapter.dtype)
        if isinstance(adapter.base, _FORMS):
            base = recompress(base, adapter.base)
        node = eqx.tree_at(lambda node: node.base, adapter, base)
        assert target is not None  # or there was an error
        if isinstance(target.holder, eqx.nn.Conv | eqx.nn.ConvTranspose):
            new[target.keys[:-1]] = CompressedConv(target.holder, node)
        else:
            new[target.keys] = node
    return replace(merged, new)


def _without_update(adapter: LoRAArray, merged: Array) -> Array:
    total = accumulate(merged)
    if adapter.magnitude is not None:
        lengths = adapter.magnitude.astype(total.dtype)
        norms = adapter.row_norms().astype(total.dtype)
        factor = norms / jnp.where(lengths == 0, 1, lengths)
        total = total * jnp.broadcast_to(factor[..., None], total.shape)
    base = total - adapter.update().astype(total.dtype)
    if adapter.magnitude is None:
        return base
    # Rows of no length say nothing of what they were.
    empty = jnp.broadcast_to((adapter.magnitude == 0)[..., None], total.shape)
    return jnp.where(empty, accumulate(as_array(adapter.base)), base)


def _adapted(function: str, model: PyTree) -> list[tuple[Place, LoRAArray]]:
    found = [(p, p.adapter) for p in places(model) if p.adapter is not None]
    if not found:
        raise ValueError(
            f"{function}: the model has no adapter. `lora` adds them; a model that is "
            "compressed only is undone with `dequantize`."
        )
    return found


def _weight(place: Place, target: Place | None) -> Array:
    """What stands in the merged model, as a matrix."""
    if target is not None and target.adapter is None:
        value = target.value
        weight = as_array(value)
        if not isinstance(value, AbstractWeight):
            weight = as_matrix(weight, target)
        if weight.shape == place.value.shape:
            return weight
    got = "nothing" if target is None else f"{target.whole.shape}"
    if target is not None and target.adapter is not None:
        got = "one with an adapter"
    raise ValueError(
        f"unmerge: `merged` must have a weight of shape {place.value.shape} at "
        f"{place.path!r}, it has {got}. Pass what `merge(adapted)` made."
    )
