"""-1, 0 and 1 against loops in float64, and what holds for any weight."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import quant_oracle as oracle
from support.quant_cases import IN, OUT, compiled, seeds, weight_of, wide
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.arrays import Affine, AffineArray, Ternary, TernaryArray


SCALES = ("absmean", "seed", "l2", "learned")
scales = st.sampled_from(SCALES[:3])
EPS = EPSILONS["float32"]


def ties(weight, mean) -> np.ndarray:
    return np.abs(np.abs(wide(weight)) / mean - 0.5) < 1e-5


@settings(max_examples=60)
@given(seeds, st.sampled_from(SCALES), st.sampled_from(["2bit", "base3"]))
def test_codes_and_scales_are_those_of_the_loops(seed, scale, packing):
    weight = weight_of(seed)
    node = compiled()(jnp.asarray(weight), Ternary(scale=scale, packing=packing))
    codes, mean = oracle.ternary_codes(weight)
    got = np.asarray(node.ternary)
    assert set(np.unique(got)) <= {-1, 0, 1}
    sure = ~ties(weight, mean)
    np.testing.assert_array_equal(got[sure], codes[sure])
    rule = "absmean" if scale == "learned" else scale
    want = oracle.ternary_scale(weight, got, mean, rule)
    assert_close(node.scale, np.full((1, 1), want), dtype="float32", length=OUT * IN)
    assert_close(node.dense(), got * want, dtype="float32", length=OUT * IN)


@settings(max_examples=50)
@given(seeds, scales, st.integers(-30, 30))
def test_scales_follow_the_weight(seed, scale, power):
    node, scaled, negative = [
        compiled()(jnp.asarray(weight_of(seed, power=0) * factor), Ternary(scale=scale))
        for factor in (1, np.float32(2.0**power), -1)
    ]
    np.testing.assert_array_equal(node.codes, scaled.codes)
    np.testing.assert_array_equal(node.scale * 2.0**power, scaled.scale)
    np.testing.assert_array_equal(node.dense(), -negative.dense())


@settings(max_examples=50)
@given(seeds, scales)
def test_rounding_again(seed, scale):
    """Codes stay; the mean size shrinks by the density, the other scales are fixed."""
    node = compiled()(jnp.asarray(weight_of(seed)), Ternary(scale=scale))
    again = compiled()(node.dense(), Ternary(scale=scale))
    np.testing.assert_array_equal(node.ternary, again.ternary)
    density = np.mean(np.asarray(node.ternary) != 0)
    factor = density if scale == "absmean" else 1.0
    want = factor * wide(node.scale)
    assert_close(again.scale, want, dtype="float32", length=OUT * IN)


@settings(max_examples=50)
@given(seeds)
def test_least_squares_come_nearest(seed):
    weight = weight_of(seed)
    errors = {
        scale: float(
            np.sum(
                (
                    wide(compiled()(jnp.asarray(weight), Ternary(scale=scale)).dense())
                    - weight
                )
                ** 2
            )
        )
        for scale in SCALES[:3]
    }
    slack = 1 + 64 * EPS
    assert errors["l2"] <= slack * errors["absmean"]
    assert errors["l2"] <= slack * errors["seed"]


def test_published_errors_of_normal_weights():
    """5.79, 6.60 and 6.71 dB: the scales .798, 1.156 and 1.068 of their deviation."""
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    found = {}
    for scale in SCALES[:3]:
        node = compiled()(jnp.asarray(weight), Ternary(scale=scale))
        error = np.sum((wide(node.dense()) - weight) ** 2)
        found[scale] = 10 * np.log10(np.sum(wide(weight) ** 2) / error)
        assert np.mean(np.asarray(node.ternary) == 0) == pytest.approx(0.310, abs=0.005)
    assert found == pytest.approx({"absmean": 5.79, "seed": 6.60, "l2": 6.71}, abs=0.03)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 3e-38, 1e37])
def test_constant_weights(scale, value):
    node = compiled()(jnp.full((OUT, IN), value, "float32"), Ternary(scale=scale))
    assert np.all(np.isfinite(node.scale))
    assert np.all(wide(node.scale) > 0)
    error = np.abs(wide(node.dense()) - np.float32(value))
    assert np.max(error) <= max(1.2e-38, 32 * EPS * value)


@settings(max_examples=60)
@given(
    seed=seeds,
    shape=st.sampled_from([(1, 1), (3, 4), (3, 5), (2, 1, 2, 11)]),
    base3=st.booleans(),
)
def test_packed_codes_come_back(seed, shape, base3):
    """Widths that fill no whole bytes, stacks; what fills them up is never seen."""
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(-1, 2, shape), "int8")
    scale = jnp.asarray(rng.random((*shape[:-2], 1, 1)), "float32")
    spec = Ternary(packing="base3" if base3 else "2bit")
    node = TernaryArray.from_codes(codes, scale, spec, "float32")
    assert node.shape == shape
    np.testing.assert_array_equal(node.ternary, codes)
    np.testing.assert_array_equal(node.dense(), wide(codes) * wide(scale))
    assert node.codes.shape == (*shape[:-1], -(-shape[-1] // (5 if base3 else 4)))


@settings(max_examples=60)
@given(
    seed=seeds,
    count=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    zeros=st.booleans(),
)
def test_packed_affine_codes_come_back(seed, count, zeros):
    rng = np.random.default_rng(seed)
    shape = [(1, 1), (3, 5), (2, 3, 6)][count % 3]
    codes, zero = rng.integers(0, 2**count, (2, *shape)).astype(np.uint8)
    groups = (*shape[:-1], -(-shape[-1] // 4))
    zero = zero[..., : groups[-1]] if zeros else None
    scale = jnp.ones(groups, "float32")
    node = AffineArray.from_codes(
        jnp.asarray(codes),
        scale,
        None if zero is None else jnp.asarray(zero),
        Affine(count, symmetric=not zeros, group_size=4),
        "float32",
    )
    spread = 2 ** (count - 1)
    if zero is not None:
        np.testing.assert_array_equal(node.zero_points, zero)
        spread = np.repeat(wide(zero), 4, axis=-1)[..., : shape[-1]]
    np.testing.assert_array_equal(node.dense(), wide(codes) - spread)


def test_a_stack_is_its_matrices():
    stack = weight_of(4, (2, 2, OUT, IN))
    for scale in SCALES:
        node = compiled()(jnp.asarray(stack), Ternary(scale=scale))
        assert node.scale.shape == (2, 2, 1, 1)
        for i in np.ndindex(2, 2):
            part = jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i]), node)
            alone = compiled()(jnp.asarray(stack[i]), Ternary(scale=scale))
            np.testing.assert_array_equal(part.codes, alone.codes)
            assert_close(part.scale, alone.scale, dtype="float32", length=OUT * IN)


def test_bfloat16_weights_keep_their_scale_in_float32():
    weight = jnp.asarray(weight_of(0), "bfloat16")
    for spec in (Ternary(), Affine(4)):
        node = compiled()(weight, spec)
        assert node.scale.dtype == "float32"
        assert node.dtype == node.dense().dtype == "bfloat16"
        same = compiled()(weight.astype("float32"), spec)
        assert eqx.tree_equal(node.scale, same.scale)
        assert eqx.tree_equal(node.codes, same.codes)
