import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from ..arrays import NM, AbstractWeight, Affine, AffineArray, Ternary, TernaryArray
from ..arrays._affine import affine_codes, affine_steps
from ..arrays._input_scale import STATIC, is_static
from ..arrays._ternary import ternary_codes
from ..internal import check_flag, check_range, check_size
from ..kernels import spread_groups
from ._gptq_core import MOST_DAMPING, Rounded, Settings, round_columns
from ._hessian import Hessians
from ._places import Place, as_matrix
from ._quantize import (
    check_spec,
    compressed_form,
    require_finite,
    same_form,
    transform_weights,
)
from ._report import Report
from ._rules import Rule


def gptq(
    model: PyTree,
    stats: Hessians,
    rules: Sequence[Rule],
    *,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
) -> tuple[PyTree, Report]:
    r"""The model with compressed weights whose outputs, not values, are near.

    Of all codes, `quantize` takes the nearest to each weight; `gptq` goes through the
    columns of a matrix, and what rounding one of them does to the outputs is made up
    for by the columns that are still to come, so that

    $$\mathrm{tr}(\Delta H \Delta^T) = \sum_t \lVert \Delta x_t \rVert^2, \quad
    \Delta = W - \hat W$$

    becomes small. Frantar et al., *GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers*, arXiv 2210.17323. The form of the result, its
    speed and its bytes are those of `quantize` with the same rules. Inputs that are
    always zero get a weight of zero.

    $H$ is damped, $H + \lambda\, \mathrm{mean}(\mathrm{diag} H)\, I$, the mean over
    inputs that are not always zero. Where it has no finite factor, $\lambda$ is raised
    tenfold, up to 1. A matrix without a usable $H$, of a convolution, of a table whose
    rows are looked up, of an expert that no token chose, is rounded to nearest, and the
    report says so. Each matrix of a stack is by itself; all are computed at once.

    **Arguments:**

    - `model`: any PyTree.
    - `stats`: of `collect_hessian`, for this model.
    - `rules`: as for `quantize`, with `Affine` or `Ternary`. The scale of a `Ternary`
        is that of `quantize`, and the nearest of its three values is taken.
    - `block_size`: columns that share one product of matrices; the codes do not depend
        on it, but for rounding.
    - `act_order`: whether columns go by falling $H_{jj}$, those that matter most first.
        Codes lie in the order of the weight all the same, and groups are of neighbours
        there: the paper's code makes groups of neighbours in the new order unless they
        are static, and has to keep the group of each column. Here groups that are not
        static go as a whole, by the largest $H_{jj}$ in each, and columns within them.
    - `static_groups`: whether the steps of groups are those of the weight as it is,
        else of the weight as it stands when the group's turn comes.
    - `damping`: $\lambda$, relative to the mean of the diagonal.

    **Returns:**

    `(model, report)`. The `details` of an entry hold, for each matrix, `loss`, the sum
    above without damping; `damp_used`, the last $\lambda$; and `fallback`, whether it
    was rounded to nearest.

    **Raises:**

    As `quantize`; and `ValueError` for `stats` of another model, an `NM`, or an option
    out of range.

    !!! example

        ```python
        rules = [Rule(r".*embedding.*", None), Rule(r".*weight", Affine(4))]
        stats = collect_hessian(model, lambda model, x: model(x), batches, rules)
        small, found = gptq(model, stats, rules, act_order=True)
        print(found)
        ```
    """
    settings = _settings(block_size, act_order, static_groups, damping)
    if not isinstance(stats, Hessians):
        raise ValueError(
            f"gptq: `stats` must be what `collect_hessian` returns, got {stats!r}."
        )
    details: dict[str, dict[str, Array]] = {}

    def make(function: str, place: Place, spec: Any) -> AbstractWeight:
        _check(function, place, spec)
        if isinstance(place.value, AbstractWeight):
            return same_form(function, place, spec, (AffineArray, TernaryArray))
        weight = as_matrix(require_finite(function, place), place)
        hessian = stats.matrices.get(place.path)
        if hessian is None:
            fallback = jnp.ones(weight.shape[:-2], jnp.bool_)
            details[place.path] = {"fallback": fallback}
            return compressed_form(weight, spec)
        _check_hessian(function, place, hessian)
        node, details[place.path] = _solved(weight, hessian, spec, settings)
        return node

    model, found = transform_weights("gptq", model, rules, make)
    _check_used(stats, details)
    entries = tuple(
        dataclasses.replace(entry, details=details.get(entry.path, entry.details))
        for entry in found.entries
    )
    return model, Report(entries, found.left_alone)


@eqx.filter_jit
def _solved(
    weight: Float[Array, "*stack out in"],
    hessian: Float[Array, "*stack in in"],
    spec: Affine | Ternary,
    settings: Settings,
) -> tuple[AbstractWeight, dict[str, Array]]:
    solve = partial(round_columns, spec=spec, settings=settings)
    for _ in weight.shape[:-2]:
        solve = jax.vmap(solve)
    rounded: Rounded = solve(weight, hessian)
    node = _node(weight, rounded, spec)
    change = weight.astype(hessian.dtype) - node.dense().astype(hessian.dtype)
    exact = jax.lax.Precision.HIGHEST
    pulled = jnp.matmul(change, hessian, precision=exact)
    return node, {
        "loss": jnp.sum(pulled * change, axis=(-2, -1)),
        "damp_used": jnp.where(rounded.solved, rounded.damp_used, 0),
        "fallback": jnp.logical_not(rounded.solved),
    }


def _node(weight, rounded: Rounded, spec: Affine | Ternary) -> AbstractWeight:
    """Of the codes that were found or, where there are none, of the nearest ones."""
    ternary = isinstance(spec, Ternary)
    codes = rounded.steps.astype(jnp.int8) if ternary else _codes(rounded, spec)
    found = codes, rounded.scale, rounded.zero

    def mended():
        if isinstance(spec, Ternary):
            nearest = (*ternary_codes(weight, spec), None)
        else:
            scale, zero = affine_steps(weight, spec)
            nearest = affine_codes(weight, scale, zero, spec), scale, zero
        solved = rounded.solved[..., None, None]
        return jax.tree.map(lambda x, y: jnp.where(solved, x, y), found, nearest)

    # Seldom needed, so seldom computed.
    whole = jnp.all(rounded.solved)
    codes, scale, zero = jax.lax.cond(whole, lambda: found, mended)
    if isinstance(spec, Ternary):
        return TernaryArray.from_codes(codes, scale, spec, weight.dtype)
    return AffineArray.from_codes(codes, scale, zero, spec, weight.dtype)


def _codes(rounded: Rounded, spec: Affine) -> UInt8[Array, "*stack out in"]:
    steps = rounded.steps
    packing = spec.packing(steps.shape[-1])
    if rounded.zero is None:
        return (steps + packing.middle).astype(jnp.uint8)
    zero = rounded.zero.astype(steps.dtype)
    return (steps + spread_groups(zero, steps.shape, packing)).astype(jnp.uint8)


def _settings(block_size, act_order, static_groups, damping) -> Settings:
    check_size("block_size", block_size)
    check_flag("act_order", act_order)
    check_flag("static_groups", static_groups)
    hint = "It is a share of the mean of the diagonal; 0.01 is usual."
    check_range("damping", damping, least=0, most=MOST_DAMPING, hint=hint)
    return Settings(block_size, act_order, static_groups, float(damping))


def _check(function: str, place: Place, spec: Any) -> None:
    check_spec(function, spec)
    if isinstance(spec, NM):
        raise ValueError(
            f"{function}: rounds to codes, an Affine or a Ternary; the rule for "
            f"{place.path!r} asks for {spec}. Use `quantize` for it."
        )
    if is_static(spec):
        raise ValueError(
            f"{function}: the rule for {place.path!r} asks for activations={STATIC!r}, "
            "whose steps come from `calibrate`. Use `quantize(model, rules, "
            "calibration=found)` for it, or activations='int8'."
        )


def _check_hessian(function: str, place: Place, hessian: Array) -> None:
    shape = place.value.shape
    expected = (*shape[:-2], shape[-1], shape[-1])
    if hessian.shape != expected:
        raise ValueError(
            f"{function}: `stats` has a matrix of shape {hessian.shape} for "
            f"{place.path!r}, a weight of shape {shape}, which needs {expected}. Were "
            "they collected before the model was stacked, or for another one?"
        )


def _check_used(stats: Hessians, details: Mapping[str, Mapping[str, Array]]) -> None:
    """That none of them fits is a mistake; that some have none is in the report."""
    if stats.matrices and details and not set(stats.matrices) & set(details):
        raise ValueError(
            f"gptq: `stats` is of weights like {next(iter(stats.matrices))!r}, the "
            f"rules choose others, like {next(iter(details))!r}. Collect it for this "
            "model, with these rules."
        )
