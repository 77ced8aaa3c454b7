"""GPTQ of one matrix, against the paper's column-by-column form in NumPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import gptq_oracle as oracle
from support.messages import refused
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.arrays import NM, Affine, AffineArray, Ternary, TernaryArray
from capibara_eqx.transforms import Hessians, Rule, gptq, quantize
from capibara_eqx.transforms._gptq_core import Settings, round_columns


seeds = st.integers(0, 2**32 - 1)
# Few shapes, many numbers: every one of them is compiled. In a full range the largest
# value of a row lies halfway between two codes, where the last digit decides.
SPECS = (
    Affine(3, range="narrow"),
    Affine(4, symmetric=False),
    Affine(4, range="narrow", group_size=4),
)


@functools.cache
def compiled(spec, chosen):
    return jax.jit(functools.partial(round_columns, spec=spec, settings=chosen))


def run(weight, hessian, spec, **options):
    """In float64, so that a code differs only if the arithmetic does."""
    with enable_x64(True):
        found = compiled(spec, Settings(**options))(
            jnp.asarray(weight, jnp.float64), jnp.asarray(hessian, jnp.float64)
        )
        return jax.tree.map(np.asarray, found)


def values(found, spec):
    """What the steps stand for."""
    size = found.steps.shape[1]
    return found.steps * np.repeat(found.scale, spec.group_size or size, 1)[:, :size]


CASES = {
    "two bits": (Affine(2), {"block_size": 4}),
    "asymmetric": (Affine(4, symmetric=False), {"block_size": 1}),
    "by importance": (Affine(8), {"act_order": True}),
    "groups": (Affine(3, group_size=5), {"block_size": 4}),
    "groups of one block": (Affine(4, symmetric=False, group_size=6), {}),
    "groups by importance": (
        Affine(4, symmetric=False, group_size=6),
        {"act_order": True, "block_size": 4},
    ),
    "static groups": (
        Affine(3, group_size=5),
        {"static_groups": True, "block_size": 4},
    ),
    "static groups by importance": (
        Affine(4, symmetric=False, group_size=6),
        {"static_groups": True, "act_order": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_codes_are_those_of_the_paper(case):
    spec, options = CASES[case]
    weight, hessian = oracle.problem(3, 5, 13, dead=(4,))
    chosen = {k: v for k, v in options.items() if k != "block_size"}
    expected = oracle.gptq(weight, hessian, spec, **chosen)
    found = run(weight, hessian, spec, **options)
    np.testing.assert_array_equal(found.steps, expected.steps)
    assert_close(found.scale, expected.scale, dtype="float64", length=13)
    if not spec.symmetric:
        np.testing.assert_array_equal(found.zero, expected.zero)
    assert found.solved
    assert found.damp_used == 0.01
    assert not found.steps[:, 4].any()


def test_the_codes_of_a_long_row_are_those_of_the_paper():
    """Several blocks, the last of them not full, and groups longer than one."""
    weight, hessian = oracle.problem(5, 9, 101)
    spec = Affine(3, group_size=37)
    expected = oracle.gptq(weight, hessian, spec)
    for block_size in (16, 20):
        found = run(weight, hessian, spec, block_size=block_size)
        np.testing.assert_array_equal(found.steps, expected.steps)


def test_ternary_takes_the_nearest_of_three():
    weight, hessian = oracle.problem(8, 6, 11)
    found = run(weight, hessian, Ternary())
    gamma = np.mean(np.abs(weight))
    assert_close(found.scale, np.full((1, 1), gamma), dtype="float64", length=66)
    current, factor = weight.copy(), None
    factor = oracle.inverse_factor(oracle.damped_hessian(hessian, 0.01))
    for j in range(11):
        step = np.clip(np.round(current[:, j] / gamma), -1, 1)
        np.testing.assert_array_equal(found.steps[:, j], step)
        error = (current[:, j] - gamma * step) / factor[j, j]
        current[:, j:] -= np.outer(error, factor[j, j:])


@settings(max_examples=50)
@given(seed=seeds, spec=st.sampled_from(SPECS), act_order=st.booleans())
def test_errors_of_columns_are_the_loss(seed, spec, act_order):
    """13: their squares add up to it, and each is at most half a step."""
    weight, hessian = oracle.problem(seed, 4, 9)
    found = run(weight, hessian, spec, act_order=act_order)
    order = oracle.column_order(hessian, spec.group_size or 9, act_order, False)
    damped = oracle.damped_hessian(hessian, 0.01)
    factor = oracle.inverse_factor(damped[np.ix_(order, order)])
    rounded = values(found, spec)
    current, errors = weight[:, order].copy(), np.zeros_like(weight)
    low, high = oracle.limits(spec)
    for j, column in enumerate(order):
        off = current[:, j] - rounded[:, column]
        scale = found.scale[:, column // (spec.group_size or 9)]
        zero = 0 if found.zero is None else found.zero[:, 0].astype(float)
        at_end = np.isin(found.steps[:, column] + zero, [low, high])
        assert np.all((np.abs(off) <= scale * (0.5 + 1e-9)) | at_end)
        errors[:, j] = off / factor[j, j]
        current[:, j:] -= np.outer(errors[:, j], factor[j, j:])
    change = weight - rounded
    loss = np.sum((change @ damped) * change)
    np.testing.assert_allclose(np.sum(errors**2), loss, rtol=1e-9)


@settings(max_examples=50)
@given(seed=seeds, spec=st.sampled_from(SPECS), act_order=st.booleans())
def test_the_loss_is_bounded_where_nothing_is_clipped(seed, spec, act_order):
    """13: by a quarter of the squared steps, each over its column of the factor."""
    weight, hessian = oracle.problem(seed, 4, 9)
    found = run(weight, hessian, spec, act_order=act_order)
    expected = oracle.gptq(weight, hessian, spec, act_order=act_order)
    factor = oracle.inverse_factor(
        expected.damped[np.ix_(expected.order, expected.order)]
    )
    group = np.repeat(np.arange(found.scale.shape[1]), spec.group_size or 9)[:9]
    steps = found.scale[:, group[expected.order]]
    change = weight - values(found, spec)
    rows = np.sum((change @ expected.damped) * change, axis=1)
    bound = np.sum(steps**2 / np.diag(factor) ** 2, axis=1) / 4
    off = np.abs(expected.errors) * np.diag(factor)
    unclipped = np.all(off <= steps * (0.5 + 1e-9), axis=1)
    assert np.all(rows[unclipped] <= bound[unclipped] * (1 + 1e-9))


@settings(max_examples=50)
@given(seed=seeds, spec=st.sampled_from(SPECS), power=st.integers(-40, 40))
def test_the_size_of_the_hessian_does_not_matter(seed, spec, power):
    weight, hessian = oracle.problem(seed, 4, 9)
    found = run(weight, hessian, spec)
    scaled = run(weight, hessian * 2.0**power * 1.7, spec)
    np.testing.assert_array_equal(found.steps, scaled.steps)
    assert_close(scaled.scale, found.scale, dtype="float64", length=9)


@settings(max_examples=50)
@given(seed=seeds, spec=st.sampled_from(SPECS), act_order=st.booleans())
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(
    seed, spec, act_order
):
    weight, hessian = oracle.problem(seed, 4, 9)
    diagonal = np.diag(np.diag(hessian))
    found = run(weight, diagonal, spec, act_order=act_order)
    with enable_x64(True):
        plain = AffineArray.compress(jnp.asarray(weight, jnp.float64), spec)
        np.testing.assert_allclose(values(found, spec), plain.dense(), rtol=1e-14)


@settings(max_examples=50)
@given(seed=seeds, symmetric=st.booleans())
def test_by_importance_the_order_of_the_inputs_does_not_matter(seed, symmetric):
    weight, hessian = oracle.problem(seed, 4, 9)
    spec = Affine(4, symmetric=symmetric)
    order = np.random.default_rng(seed).permutation(9)
    found = run(weight, hessian, spec, act_order=True)
    moved = run(weight[:, order], hessian[np.ix_(order, order)], spec, act_order=True)
    np.testing.assert_array_equal(moved.steps, found.steps[:, order])


@settings(max_examples=50)
@given(
    seed=seeds, spec=st.sampled_from(SPECS[:2]), damping=st.sampled_from([0.01, 0.1])
)
def test_every_column_is_the_best_after_those_before(seed, spec, damping):
    """14: it rounds the solution of least squares over all columns to come."""
    weight, hessian = oracle.problem(seed, 3, 9)
    found = run(weight, hessian, spec, damping=damping)
    rounded = values(found, spec)
    zero = 0 if found.zero is None else found.zero[:, 0].astype(float)
    root = np.linalg.cholesky(oracle.damped_hessian(hessian, damping)).T
    for j in range(9):
        # || root (w - v) || with v given before j and free from there on.
        target = root @ (weight.T - np.vstack([rounded[:, :j].T, np.zeros((9 - j, 3))]))
        best, *_ = np.linalg.lstsq(root[:, j:], target, rcond=None)
        expected = oracle.nearest(best[0], found.scale[:, 0], zero, spec)
        np.testing.assert_array_equal(found.steps[:, j], expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.slow
def test_each_matrix_of_a_stack_is_by_itself(spec):
    problems = [oracle.problem(seed, 4, 9) for seed in range(6)]
    weight, hessian = (np.stack(parts) for parts in zip(*problems, strict=True))
    with enable_x64(True):
        model = {"weight": jnp.asarray(weight.reshape(2, 3, 4, 9))}
        stats = Hessians(
            {"weight": jnp.asarray(hessian.reshape(2, 3, 9, 9))},
            {"weight": jnp.full((2, 3), 27, jnp.int32)},
        )
        small, found = gptq(model, stats, [Rule("weight", spec)])
        dense = np.asarray(small["weight"].dense()).reshape(6, 4, 9)
        loss = np.asarray(found.entries[0].details["loss"]).reshape(6)
    for i, (w, h) in enumerate(problems):
        expected = oracle.gptq(w, h, spec).values
        assert_close(dense[i], expected, dtype="float64", length=9)
        change = w - expected
        assert_close(loss[i], np.sum((change @ h) * change), dtype="float64", length=81)


def of_matrix(weight, hessian, spec, **options):
    """`gptq` of a model that is one matrix, in float32."""
    model = {"weight": jnp.asarray(weight, jnp.float32)}
    stats = Hessians(
        {"weight": jnp.asarray(hessian, jnp.float32)},
        {"weight": jnp.asarray(1, jnp.int32)},
    )
    small, found = gptq(model, stats, [Rule("weight", spec)], **options)
    return small["weight"], found


def test_damping_is_raised_until_there_is_a_factor():
    spec = Affine(4, range="narrow")
    weight, _ = oracle.problem(0, 3, 6)
    # Not even semidefinite: its least value is -0.05 of the mean of the diagonal.
    hessian = np.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1.05
    node, found = of_matrix(weight, hessian, spec)
    details = found.entries[0].details
    assert_close(details["damp_used"], 0.1, dtype="float32")
    assert not details["fallback"]
    expected = oracle.gptq(weight, hessian, spec, damping=0.1)
    assert_close(node.dense(), expected.values, dtype="float32", length=6)
    assert "ROUNDED" not in str(found)


@pytest.mark.parametrize("kind", ["indefinite", "nan", "zero"])
@pytest.mark.parametrize("spec", [Affine(4, group_size=4), Ternary()], ids=str)
def test_without_a_usable_hessian_it_rounds_to_nearest_and_says_so(kind, spec):
    weight, hessian = oracle.problem(0, 3, 6)
    hessian = {
        "indefinite": np.diag([1.0, 1, 1, 1, 1, 1]) + 5 * (1 - np.eye(6)),
        "nan": hessian * np.nan,
        "zero": hessian * 0,
    }[kind]
    node, found = of_matrix(weight, hessian, spec)
    plain, _ = quantize(
        {"weight": jnp.asarray(weight, jnp.float32)}, [Rule("weight", spec)]
    )
    assert eqx.tree_equal(node, plain["weight"])
    assert found.entries[0].details["fallback"]
    assert "ROUNDED TO NEAREST, without a usable Hessian: weight" in str(found)


def test_a_weight_without_a_hessian_is_named():
    model = {"a": jnp.eye(3), "b": jnp.eye(3) + 1}
    stats = Hessians({"a": jnp.eye(3)}, {"a": jnp.asarray(3, jnp.int32)})
    _, found = gptq(model, stats, [Rule(".*", Affine(4))])
    flags = {e.path: bool(e.details["fallback"]) for e in found.entries}
    assert flags == {"a": False, "b": True}
    assert str(found).count("ROUNDED TO NEAREST") == 1


@pytest.mark.slow
def test_four_bits_lose_less_than_rounding_to_nearest():
    """Not always, so on average: over correlated inputs, by half and more."""
    losses = {"gptq": [], "nearest": []}
    for seed in range(20):
        weight, hessian = oracle.problem(seed, 8, 16)
        node, found = of_matrix(weight, hessian, Affine(4))
        losses["gptq"].append(float(found.entries[0].details["loss"]))
        change = weight - np.asarray(
            AffineArray.compress(jnp.asarray(weight, jnp.float32), Affine(4)).dense(),
            np.float64,
        )
        losses["nearest"].append(np.sum((change @ hessian) * change))
        assert node.spec == Affine(4)
    assert np.mean(losses["gptq"]) < 0.5 * np.mean(losses["nearest"])


def test_a_narrow_weight_keeps_its_dtypes():
    weight, hessian = oracle.problem(0, 3, 6)
    model = {"weight": jnp.asarray(weight, jnp.bfloat16)}
    stats = Hessians(
        {"weight": jnp.asarray(hessian, jnp.float32)},
        {"weight": jnp.asarray(1, jnp.int32)},
    )
    for spec in (Affine(4, scale_dtype="bfloat16"), Affine(3, group_size=2), Ternary()):
        small, _ = gptq(model, stats, [Rule("weight", spec)])
        plain, _ = quantize(model, [Rule("weight", spec)])
        got, expected = (
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(m)]
            for m in (small, plain)
        )
        assert got == expected
        assert small["weight"].dense().dtype == jnp.bfloat16


def test_what_is_rounded_already_stays():
    weight, hessian = oracle.problem(0, 3, 6)
    node, _ = of_matrix(weight, hessian, Ternary())
    assert isinstance(node, TernaryArray)
    stats = Hessians({}, {})
    again, _ = gptq({"weight": node}, stats, [Rule("weight", Ternary())])
    assert eqx.tree_equal(again["weight"], node)


@pytest.mark.errors
def test_bad_arguments():
    model = {"weight": jnp.eye(3)}
    stats = Hessians({"weight": jnp.eye(3)}, {"weight": jnp.asarray(3, jnp.int32)})
    rules = [Rule("weight", Affine(4))]
    with refused("block_size", "0"):
        gptq(model, stats, rules, block_size=0)
    with refused("damping", "0.01"):
        gptq(model, stats, rules, damping=-1.0)
    with refused("act_order"):
        gptq(model, stats, rules, act_order=1)  # pyright: ignore[reportArgumentType]
    with refused("stats", "collect_hessian"):
        gptq(model, {}, rules)  # pyright: ignore[reportArgumentType]
    with refused("weight", "2:4", "quantize"):
        gptq(model, stats, [Rule("weight", NM(2, 4))])
    other = Hessians({"weight": jnp.eye(4)}, {"weight": jnp.asarray(3, jnp.int32)})
    with refused("(4, 4)", "weight", "(3, 3)"):
        gptq(model, other, rules)
    other = Hessians({"head": jnp.eye(3)}, {"head": jnp.asarray(3, jnp.int32)})
    with refused("head", "weight", "stats"):
        gptq(model, other, rules)
    node, _ = gptq(model, stats, rules)
    with refused("dequantize", "weight"):
        gptq(node, stats, [Rule("weight", Affine(8))])
