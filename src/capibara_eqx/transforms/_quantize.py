import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from ..arrays import (
    AbstractWeight,
    AffineArray,
    FakeQuantArray,
    SparseArray,
    Spec,
    TernaryArray,
    compress,
)
from ..layers import CompressedConv
from ._calibrate import Calibration
from ._places import Place, as_matrix, places, replace
from ._report import Report, entry, report
from ._rules import Rule, choose
from ._static_inputs import check_calibration, input_scale


_COMPRESSED = (AffineArray, TernaryArray, SparseArray)
compressed_form = eqx.filter_jit(compress)


def quantize(
    model: PyTree, rules: Sequence[Rule], *, calibration: Calibration | None = None
) -> tuple[PyTree, Report]:
    """The model with compressed weights in the place of some of its weights.

    What can be compressed are the matrices of `Linear` and `Embedding` layers, here and
    in Equinox, of Equinox' recurrent cells and convolutions, of experts, and every
    array of two axes or more in a module of your own. Axes in front of the last two,
    of layers or experts in a stack, are kept: each matrix gets its own steps. Weights
    that have the form already stay as they are.

    Works under `jit`; the numbers of the report are then traced.

    **Arguments:**

    - `model`: any PyTree.
    - `rules`: which weight gets which form, an `Affine`, a `Ternary`, an `NM` or
        `None`. The first that matches counts.
    - `calibration`: of `calibrate`, for weights that a rule gives
        `activations="static_int8"`: inputs are rounded by its `steps`, which stay as
        they are from then on.

    **Returns:**

    `(model, report)`: the report lists the form, the bytes and the error of each
    weight, and everything that was left alone.

    **Raises:**

    `ValueError` for a rule that matches nothing or that earlier rules leave nothing,
    for a weight that has another form already, or for one that is not finite; and for
    a calibration that is missing, that no rule asks for, that no input of the weight is
    in, or that does not fit: the message names it. What is wrong with numbers is an
    error at run time under `jit`.

    !!! example

        ```python
        rules = [Rule(r".*embedding.*", None), Rule(r".*weight", Affine(4))]
        small, found = quantize(model, rules)
        print(found)

        rules = [Rule(".*proj/weight", Affine(8, activations="static_int8"))]
        found = calibrate(model, lambda model, x: model(x), batches, rules)
        small, _ = quantize(model, rules, calibration=found)
        ```
    """
    check_calibration("quantize", calibration, rules)
    make = functools.partial(_packed, calibration)
    return transform_weights("quantize", model, rules, make)


def prepare_qat(
    model: PyTree, rules: Sequence[Rule], *, calibration: Calibration | None = None
) -> tuple[PyTree, Report]:
    """The model with weights that compute as if they were compressed, for training.

    Each becomes a `FakeQuantArray`: its forward pass is that of the compressed weight,
    its gradients are those of a weight that is not rounded. `convert` ends it.

    **Arguments:**

    - `model`, `rules`, `calibration`: as for `quantize`.

    **Returns:**

    `(model, report)`. The bytes are those in training.

    **Raises:**

    As `quantize`.

    !!! example

        ```python
        model, _ = prepare_qat(model, [Rule(r".*weight", Ternary(activations="int8"))])
        # ... train as usual ...
        small = convert(model)
        ```
    """
    check_calibration("prepare_qat", calibration, rules)
    make = functools.partial(_faked, calibration)
    return transform_weights("prepare_qat", model, rules, make)


def convert(model: PyTree) -> PyTree:
    """The model after training with `prepare_qat`, its weights compressed.

    Its outputs are those of the model in training, but for the rounding of float32.

    **Arguments:**

    - `model`: any PyTree.

    **Returns:**

    The model; what was not prepared stays as it is.

    **Raises:**

    `ValueError` if nothing in it was prepared.

    !!! example

        ```python
        small = convert(model)
        print(report(small))
        ```
    """
    fakes = [p for p in places(model) if isinstance(p.value, FakeQuantArray)]
    if not fakes:
        raise ValueError(
            "convert: `model` has no weight that `prepare_qat` prepared. To compress a "
            "model as it is, use `quantize`."
        )
    new = {
        place.keys: compressed_form(require_finite("convert", place), place.value.spec)
        for place in fakes
    }
    return replace(model, new)


def dequantize(model: PyTree) -> PyTree:
    """The model with plain arrays again, of the values that it computes with.

    Its structure and dtypes are those before `quantize` or `prepare_qat`.

    **Arguments:**

    - `model`: any PyTree.

    **Returns:**

    The model.

    !!! example

        ```python
        small, _ = quantize(model, [Rule(".*weight", Affine(8))])
        rounded = dequantize(small)                    # float weights again
        ```
    """
    new: dict[tuple[Any, ...], Any] = {}
    for place in places(model):
        if not isinstance(place.value, (*_COMPRESSED, FakeQuantArray)):
            continue
        if isinstance(place.holder, CompressedConv) and place.adapter is None:
            new[place.keys[:-1]] = place.holder.restored()
        else:
            new[place.keys] = place.value.dense()
    return replace(model, new)


def transform_weights(
    function: str,
    model: PyTree,
    rules: Sequence[Rule],
    make: Callable[[str, Place, Spec], AbstractWeight],
) -> tuple[PyTree, Report]:
    """The model with what `make` gives for every weight that a rule chooses.

    `make(function, place, spec)` returns what stands at the place already to leave it.
    """
    found = places(model)
    weights = [place for place in found if place.is_matrix]
    others = [place.path for place in found if not place.is_matrix]
    chosen = choose(function, rules, [place.path for place in weights], others)
    new, entries = {}, {}
    for place in weights:
        rule = chosen.get(place.path)
        if rule is None or rule.spec is None:
            continue
        node = make(function, place, rule.spec)
        if node is place.value:
            continue
        entries[place.path] = entry(place.path, place.around(node), place.whole)
        if isinstance(place.holder, eqx.nn.Conv | eqx.nn.ConvTranspose):
            new[place.keys[:-1]] = CompressedConv(place.holder, node)
        else:
            new[place.keys] = node
    model = replace(model, new)
    whole = report(model)
    # With the error of what was compressed just now.
    listed = tuple(entries.get(e.path, e) for e in whole.entries)
    return model, Report(listed, whole.left_alone)


def _packed(
    calibration: Calibration | None, function: str, place: Place, spec: Spec
) -> AbstractWeight:
    check_spec(function, spec)
    if isinstance(place.value, AbstractWeight):
        return same_form(function, place, spec, _COMPRESSED)
    return _named(
        function,
        place,
        compressed_form,
        as_matrix(require_finite(function, place), place),
        spec,
        input_scale(function, place, spec, calibration),
    )


def _faked(
    calibration: Calibration | None, function: str, place: Place, spec: Spec
) -> AbstractWeight:
    check_spec(function, spec)
    if isinstance(place.value, AbstractWeight):
        return same_form(function, place, spec, (FakeQuantArray,))
    weight = as_matrix(require_finite(function, place), place)
    step = input_scale(function, place, spec, calibration)
    # What cannot be compressed should fail here, not after the training.
    _named(function, place, lambda: eqx.filter_eval_shape(compress, weight, spec, step))
    return FakeQuantArray.of(weight, spec, step)


def same_form(function, place, spec, kinds) -> AbstractWeight:
    """The node that stands there, if it has the form; otherwise a `ValueError`."""
    node = place.value
    if isinstance(node, kinds) and node.spec == spec:
        return node
    if isinstance(node, FakeQuantArray):
        fix = "End the training with `convert` first, or undo it with `dequantize`."
    else:
        fix = "Undo it with `dequantize` first."
    wanted = "training as " if FakeQuantArray in kinds else ""
    raise ValueError(
        f"{function}: {place.path!r} is already kept as {type(node).__name__} "
        f"({getattr(node, 'spec', 'no spec')}), the rule asks for {wanted}{spec}"
        f"{_difference(getattr(node, 'spec', None), spec)}. {fix}"
    )


def _difference(old: Any, new: Any) -> str:
    """The fields in which two specs of a kind differ: not all of them are printed."""
    if type(old) is not type(new):
        return ""
    changes = [
        f"{field.name}={getattr(new, field.name)!r} instead of "
        f"{getattr(old, field.name)!r}"
        for field in dataclasses.fields(new)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    return f" with {', '.join(changes)}" if changes else ""


def check_spec(function: str, spec: Any) -> None:
    """Raise `ValueError` unless `spec` is a form that weights can be kept in."""
    if not isinstance(spec, Spec):
        called = f" Call it: {spec.__name__}()." if isinstance(spec, type) else ""
        raise ValueError(
            f"{function}: the `spec` of a Rule must be an Affine, a Ternary, an NM or "
            f"None, got {spec!r}.{called}"
        )


def require_finite(function: str, place: Place) -> Any:
    """The weight there, checked: at once, or at run time under `jit`."""
    value = place.value
    weight = value.weight if isinstance(value, FakeQuantArray) else value
    finite = jnp.all(jnp.isfinite(weight))
    message = (
        f"{function}: the weight {place.path!r} is not finite: it holds NaN or "
        "infinity, which no code stands for. Did the training diverge?"
    )
    if not isinstance(finite, Tracer):
        if not finite:
            raise ValueError(message)
        return value
    checked = eqx.error_if(weight, ~finite, message)
    if isinstance(value, FakeQuantArray):
        return eqx.tree_at(lambda node: node.weight, value, checked)
    return checked


def _named(function: str, place: Place, action: Callable[..., Any], *args: Any) -> Any:
    """`action`, whose complaints name the weight."""
    try:
        return action(*args)
    except ValueError as error:
        message = f"{function}: the weight {place.path!r} cannot have this form: "
        raise ValueError(f"{message}{error}") from error
