from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from ..arrays import (
    AbstractWeight,
    AffineArray,
    FakeQuantArray,
    LoRAArray,
    SparseArray,
    TernaryArray,
)
from ..kernels import unpack_codes
from ._places import places


_TRITS = 3**5  # bytes of five trits are below
_SHOWN = 5  # weights in a message


def check(model: PyTree) -> PyTree:
    """The model itself, if what its compressed weights keep can be.

    Bytes of a file that are not what was written pass for codes: this finds codes that
    stand for no value, and steps that are NaN, infinite or not above zero, which no
    transform writes. A wrong code that stands for some value is not to be found so.

    **Arguments:**

    - `model`: any PyTree, as it was read.

    **Returns:**

    The model, as it is.

    **Raises:**

    `ValueError` for what cannot be: the message names the weights and what they hold.

    !!! example

        ```python
        small, _ = quantize(model, [Rule(".*weight", Affine(4))])
        small = check(small)                           # or what was read from a file
        ```
    """
    problems = [
        f"{place.path!r}, kept as {node.spec}, has {words}"
        for place in places(model)
        for node in (place.value, place.adapter)
        if node is not None
        for words in _problems(node)
    ]
    if not problems:
        return model
    listed = "; ".join(problems[:_SHOWN])
    more = len(problems) - _SHOWN
    raise ValueError(
        f"check: the model is damaged: {listed}{f'; and {more} more' * (more > 0)}. "
        "Copy its file again, or compress the model that it was made of again. If the "
        "file is whole, was it read into a model of other rules than it was written "
        "from?"
    )


def _problems(node: Any) -> list[str]:
    """What a node holds that cannot be, in words."""
    if not isinstance(node, _KEPT):
        return []
    found = {name: (bool(bad), value) for name, (bad, value) in _found(node).items()}
    return [
        f"{_WORDS[name]} {value.item()}{_REASONS[name]}"
        for name, (bad, value) in found.items()
        if bad
    ]


_KEPT = (AffineArray, TernaryArray, SparseArray, FakeQuantArray, LoRAArray)
_WORDS = {
    "codes": "the code",
    "bytes": "the byte",
    "places": "the place",
    "values": "the value",
    "scale": "the step",
    "learned": "the learned step",
    "adapter": "the value of an adapter",
    "input_scale": "the step of inputs",
}
_REASONS = {
    "codes": ", which stands for no value",
    "bytes": ", which stands for no five values",
    "places": ", which is not in its group or not in order",
    "values": ", which is not finite",
    "scale": ", which is not positive and finite",
    "learned": ", which is not finite",
    "adapter": ", which is not finite",
    "input_scale": ", which is not positive and finite",
}


@eqx.filter_jit
def _found(node: AbstractWeight) -> dict[str, tuple[Bool[Array, ""], Array]]:
    """By part: whether something in it cannot be, and the first that cannot."""
    found = {}
    if isinstance(node, AffineArray):
        spec = node.spec
        codes = unpack_codes(node.codes, spec.bits, node.in_features)
        low, high = spec.limits
        origin = 2 ** (spec.bits - 1) if spec.symmetric else 0
        wide = codes.astype(jnp.int32)
        found["codes"] = _first((wide < low + origin) | (wide > high + origin), codes)
    if isinstance(node, TernaryArray):
        if node.spec.packing == "base3":
            found["bytes"] = _first(node.codes >= _TRITS, node.codes)
        else:
            found["codes"] = _first(jnp.abs(node.ternary) > 1, node.ternary)
    if isinstance(node, AffineArray | TernaryArray):
        found["scale"] = _first(~_positive(node.scale), node.scale)
    if isinstance(node, SparseArray):
        at = node.unpacked_places
        before = jnp.concatenate([jnp.full_like(at[..., :1], -1), at[..., :-1]], -1)
        found["places"] = _first((at >= node.spec.m) | (at <= before), at)
        found["values"] = _first(~jnp.isfinite(node.values), node.values)
    if isinstance(node, FakeQuantArray):
        found["values"] = _first(~jnp.isfinite(node.weight), node.weight)
        # Training may take one below zero: its size is what counts.
        if node.step is not None:
            found["learned"] = _first(~jnp.isfinite(node.step), node.step)
    if isinstance(node, LoRAArray):
        parts = [x for x in (node.a, node.b, node.magnitude) if x is not None]
        values = jnp.concatenate([x.ravel().astype(node.a.dtype) for x in parts])
        found["adapter"] = _first(~jnp.isfinite(values), values)
    step = getattr(node, "input_scale", None)
    if step is not None:
        found["input_scale"] = _first(~_positive(step), step)
    return found


def _positive(x):
    return (x > 0) & jnp.isfinite(x)


def _first(bad, values):
    if bad.size == 0:
        return jnp.zeros((), jnp.bool_), jnp.zeros((), values.dtype)
    return jnp.any(bad), values.ravel()[jnp.argmax(bad.ravel())]
