"""Codes of a few bits against loops in float64, and what holds for any weight."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import quant_oracle as oracle
from support.quant_cases import (
    IN,
    KINDS,
    OUT,
    compiled,
    seeds,
    weight_of,
    wide,
)
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.arrays import Affine, AffineArray


EPS = EPSILONS["float32"]


def spec_of(count: int, kind: str, group_size: int | None = None, **options) -> Affine:
    return Affine(count, group_size=group_size, **KINDS[kind], **options)


# Groups of 3 leave a last one of 1; those of 9 are longer than a row.
TENSOR = {"granularity": "tensor"}
GRIDS: list[tuple[int, str, int | None, dict[str, Any]]] = [
    (2, "narrow", None, {}),
    (2, "full", 3, {}),
    (3, "asymmetric", None, {}),
    (3, "full", None, TENSOR),
    (4, "narrow", 3, {}),
    (4, "full", 7, {}),
    (5, "asymmetric", 3, {}),
    (6, "full", 9, {}),
    (7, "narrow", None, TENSOR),
    (8, "narrow", 3, {}),
    (8, "full", None, {}),
    (8, "asymmetric", None, TENSOR),
]
grids = st.sampled_from(GRIDS)


def rounded(seed: int, grid, power: int | None = None, **options):
    """A weight, its node, and every group: values, results, step, zero point."""
    count, kind, group_size, some = grid
    spec = spec_of(count, kind, group_size, **some, **options)
    weight = weight_of(seed, power=power)
    node = compiled()(jnp.asarray(weight), spec)
    return weight, node, each_group(node, weight)


def each_group(node: AffineArray, weight):
    size, whole = node.spec.group_size, node.spec.granularity == "tensor"
    scale = wide(node.scale)
    zero = np.zeros_like(scale) if node.zero is None else wide(node.zero_points)
    parts = [oracle.groups(w, size, whole) for w in (weight, node.dense())]
    return list(zip(*parts, scale.ravel(), zero.ravel(), strict=True))


@settings(max_examples=60)
@given(seeds, grids)
def test_codes_are_those_of_the_loops(seed, grid):
    count, kind, *_ = grid
    for values, got, scale, zero in rounded(seed, grid)[2]:
        low, high = oracle.range_of(values, kind)
        step, _ = oracle.step_of(low, high, count, kind)
        assert scale == pytest.approx(step, rel=4 * EPS)
        # Near a tie the rounding of float32 may decide for the other side.
        if kind == "asymmetric":
            assert abs(-low / step - zero) <= 0.5 + 2**count * 4 * EPS
        want = oracle.rounded(values, scale, int(zero), count, kind)
        ratio = values / scale
        tie = np.abs(np.abs(ratio - np.rint(ratio)) - 0.5) < 1e-4
        np.testing.assert_allclose(got[~tie], want[~tie], rtol=2 * EPS)
        assert np.all(np.abs(got - want)[tie] <= scale * (1 + 1e-4))


@settings(max_examples=60)
@given(seeds, grids)
def test_an_error_is_half_a_step_at_most(seed, grid):
    count, kind, *_ = grid
    low, high = oracle.limits(count, kind)
    for values, got, scale, zero in rounded(seed, grid)[2]:
        assert scale > 0
        assert np.isfinite(scale)
        assert np.max(np.abs(got - values)) <= scale * (0.5 + 2**count * EPS)
        codes = got / scale + zero
        assert np.all((codes > low - 0.01) & (codes < high + 0.01))
        assert np.max(np.abs(codes - np.rint(codes))) <= 2**count * 2 * EPS
        # Zero is a code, also where it is not in the middle.
        assert np.all(got[values == 0] == 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@settings(max_examples=50)
@given(
    seed=seeds,
    grid=st.sampled_from([GRIDS[1], GRIDS[6], GRIDS[9]]),
    power=st.integers(-40, 8),
)
def test_steps_of_16_bits_stay_in_their_range(dtype, seed, grid, power):
    _, node, groups = rounded(seed, grid, power, scale_dtype=dtype)
    assert node.scale.dtype == dtype
    for values, got, scale, _ in groups:
        assert scale >= float(jnp.finfo(dtype).tiny)
        bound = scale * (0.5 + 2 ** grid[0] * EPSILONS[dtype])
        assert np.max(np.abs(got - values)) <= bound


def test_steps_of_16_bits_do_not_lose_weights():
    """Too small for float16 they are its smallest: with 1 every weight would be 0."""
    weight = jnp.asarray(np.linspace(-5e-3, 5e-3, 14).reshape(2, 7), "float32")
    small = compiled()(weight, Affine(8, scale_dtype=jnp.float16))
    assert np.max(np.abs(wide(small.dense()) - wide(weight))) <= 2.0**-14 / 2
    large = compiled()(jnp.full((2, 7), 1e9), Affine(8, scale_dtype=jnp.float16))
    np.testing.assert_allclose(large.dense(), 127 * 65504.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1.3e-38, 1e37, -1e37, 1.0])
def test_constant_weights(kind, value):
    """Subnormal values too, which XLA takes for zeros."""
    weight = jnp.full((OUT, IN), value, "float32")
    node = compiled()(weight, spec_of(4, kind))
    error = np.abs(wide(node.dense()) - wide(weight))
    assert np.all(np.isfinite(node.scale))
    assert np.all(wide(node.scale) > 0)
    # The end of a full range lies half a step beyond its last code.
    half_a_step = abs(value) / 15 if kind == "full" else 0
    assert np.max(error) <= max(1.2e-38, 8 * EPS * abs(value)) + half_a_step


def test_a_range_wider_than_the_largest_number():
    weight = jnp.array([[-3e38, 3e38, 1e38]])
    for function in (AffineArray.compress, compiled()):
        node = function(weight, Affine(8, symmetric=False))
        error = np.abs(wide(node.dense()) - wide(weight))
        assert np.max(error) <= 6e38 / 255 * (0.5 + 256 * EPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 8])
def test_compiled_or_not_codes_are_the_same_to_the_bit(kind, count):
    """The ends of a full range are ties; steps of an asymmetric one differences."""
    weight, spec = jnp.asarray(weight_of(5, (400, 3))), spec_of(count, kind)
    node = AffineArray.compress(weight, spec)
    assert eqx.tree_equal(node, compiled()(weight, spec))


@settings(max_examples=50)
@given(seeds, grids, st.integers(-30, 30))
def test_powers_of_two_pass_through(seed, grid, power):
    _, node, _ = rounded(seed, grid, 0)
    _, scaled, _ = rounded(seed, grid, power)
    np.testing.assert_array_equal(node.codes, scaled.codes)
    np.testing.assert_array_equal(wide(node.dense()) * 2.0**power, wide(scaled.dense()))


@settings(max_examples=50)
@given(seeds, st.sampled_from([GRIDS[0], GRIDS[4], GRIDS[8]]))
def test_narrow_codes_are_odd(seed, grid):
    weight, node, _ = rounded(seed, grid)
    other = compiled()(jnp.asarray(-weight), node.spec)
    np.testing.assert_array_equal(other.dense(), -node.dense())


@settings(max_examples=50)
@given(seeds, st.sampled_from([grid for grid in GRIDS if grid[1] != "full"]))
def test_rounding_what_was_rounded_changes_no_code(seed, grid):
    """But where both ends of a range lie between two codes: one of them goes unused."""
    _, node, groups = rounded(seed, grid)
    for values, _, scale, zero in groups:
        assume(zero == 0 or abs(abs(-min(values) / scale - zero) - 0.5) > 1e-4)
    again = compiled()(node.dense(), node.spec)
    assert_close(again.dense(), node.dense(), dtype="float32", factor=2.0)


@settings(max_examples=50)
@given(seeds, st.sampled_from([GRIDS[1], GRIDS[3], GRIDS[10]]))
def test_full_codes_keep_with_their_own_steps(seed, grid):
    """Steps found anew are smaller: the largest code is half a step short."""
    _, node, _ = rounded(seed, grid)
    again = with_steps()(node.dense(), node.spec, node.scale)
    assert eqx.tree_equal(node, again)


@functools.cache
def with_steps() -> Any:
    return eqx.filter_jit(AffineArray.compress)


@settings(max_examples=50)
@given(seeds, st.sampled_from(list(KINDS)))
def test_finer_groups_and_more_bits_have_finer_steps(seed, kind):
    weight = weight_of(seed)
    some = np.any(weight != 0, axis=1)
    row, fine, more = [
        wide(compiled()(jnp.asarray(weight), spec).scale)
        for spec in (spec_of(4, kind), spec_of(4, kind, 3), spec_of(5, kind))
    ]
    # A step of 1 stands where all is zero.
    cut = np.stack([np.any(weight[:, i : i + 3] != 0, axis=1) for i in (0, 3, 6)], 1)
    assert np.all((fine <= row * (1 + EPS)) | ~cut)
    assert np.all((more <= 0.5 * row * (1 + 2 * EPS)) | ~some[:, None])


CUT = [(4, "narrow", 3, {}), (3, "asymmetric", None, {}), (4, "full", 9, {})]


@pytest.mark.parametrize("grid", CUT, ids=lambda grid: grid[1])
@settings(max_examples=50)
@given(seed=seeds, share=st.sampled_from([60.0, 99.9]))
def test_percentiles(grid, seed, share):
    """What fills the last group up does not count."""
    count, kind, *_ = grid
    options = {"calibration": "percentile", "percentile": share}
    for values, _, scale, _ in rounded(seed, grid, **options)[2]:
        low, high = oracle.range_of(values, kind, share / 100)
        step, _ = oracle.step_of(low, high, count, kind)
        # Between two values: what rounds is of the size of the larger one.
        slack = 16 * EPS * np.max(np.abs(values))
        assert abs(scale - step) <= slack or high - low <= slack


@pytest.mark.parametrize("grid", CUT, ids=lambda grid: grid[1])
@settings(max_examples=50)
@given(seed=seeds)
def test_least_squared_errors(grid, seed):
    """No other share of the range does better, of 80 from 1 down to 0.2."""
    count, kind, *_ = grid
    for values, _, scale, zero in rounded(seed, grid, calibration="mse")[2]:
        errors = errors_of_shares(values, count, kind, np.linspace(1, 0.2, 80))
        got = oracle.squared_error(values, scale, int(zero), count, kind)
        # Each value is off by a rounding of float32, beside the error that it has.
        slack = 4 * EPS * np.max(np.abs(values))
        assert got <= min(errors) + slack * np.sqrt(values.size * min(errors)) * 2 + (
            values.size * slack**2
        )


def errors_of_shares(values, count, kind, shares):
    low, high = oracle.range_of(values, kind)
    return [
        oracle.squared_error(
            values, *oracle.step_of(low * share, high * share, count, kind), count, kind
        )
        for share in shares
    ]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zero_between_two_codes_rounds_alike_in_ranges_of_every_size(bits):
    """As wide on both sides: zero is at half of an odd number of steps, to even."""
    ends = np.geomspace(1e-6, 1e6, 200, dtype=np.float32)[:, None]
    weight = jnp.asarray(np.concatenate([-ends, ends], axis=1))
    node = compiled()(weight, Affine(bits, symmetric=False))
    zero = (2**bits - 1) / 2
    np.testing.assert_array_equal(node.zero_points, np.full((200, 1), np.rint(zero)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_for_the_least_error_is_fine_enough(kind):
    """Within 5 % of a search over 500 shares, and well below the whole range."""
    weight = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    node = compiled()(jnp.asarray(weight), spec_of(3, kind, calibration="mse"))
    for values, _, scale, zero in each_group(node, weight):
        errors = errors_of_shares(values, 3, kind, np.linspace(1, 0.05, 500))
        got = oracle.squared_error(values, scale, int(zero), 3, kind)
        assert got <= 1.05 * min(errors)
        assert got < 0.95 * errors[0]


@pytest.mark.parametrize("calibration", ["minmax", "mse"])
@pytest.mark.parametrize("whole", [False, True], ids=["channel", "tensor"])
def test_a_stack_is_its_matrices(calibration, whole):
    stack = jnp.asarray(weight_of(4, (2, 2, OUT, IN)))
    options = TENSOR if whole else {}
    group_size = None if whole else 3
    spec = spec_of(4, "asymmetric", group_size, **options, calibration=calibration)
    node = compiled()(stack, spec)
    assert node.scale.shape == ((2, 2, 1, 1) if whole else (2, 2, OUT, 3))
    for i in np.ndindex(2, 2):
        part = jax.tree.map(lambda leaf, i=i: jnp.asarray(np.asarray(leaf)[i]), node)
        alone = compiled()(jnp.asarray(np.asarray(stack)[i]), spec)
        np.testing.assert_array_equal(part.dense(), alone.dense())
