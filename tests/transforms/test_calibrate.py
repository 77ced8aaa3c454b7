"""Ranges of inputs, against what NumPy finds in the inputs themselves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import refused
from support.quick import filled

from capibara_eqx.layers import MLP, MoE
from capibara_eqx.transforms import calibrate
from capibara_eqx.transforms._tally import bins, upper_edges


pytestmark = pytest.mark.slow


WIDTH = 1 / 128  # of a bin, relative


def inputs(seed=0, shape=(40, 5)):
    """With long tails: the largest is far from the others."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_t(3, shape), jnp.float32)


def identity_of(width):
    return filled(eqx.nn.Linear, width, 2, seed=0, size=1.0)


def run(layer, x):
    return jax.vmap(layer)(x)


@settings(max_examples=60)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_bin_holds_what_lies_between_its_ends(x):
    index = int(bins(jnp.asarray(x, jnp.float32)))
    ends, size = np.asarray(upper_edges()), abs(x)
    low, high = float(ends[index - 1]) if index else 0.0, float(ends[index])
    assert low <= size < high
    # Not of numbers that have fewer digits, nor where infinity comes next.
    if 2.0**-126 <= size and high < np.inf:
        assert high <= low * (1 + WIDTH)


def test_the_largest_value_is_never_clipped():
    x = [inputs(seed) for seed in range(3)]
    found = calibrate(identity_of(5), run, x, ["weight"])
    largest = np.max(np.abs(x))
    assert largest < found.ranges["weight"] <= largest * (1 + WIDTH)
    np.testing.assert_allclose(found.steps["weight"], found.ranges["weight"] / 127)
    assert found.tokens["weight"] == 120
    assert found.histograms["weight"].sum() == 600
    assert "120 tokens  up to" in str(found)


@pytest.mark.parametrize("percentile", [60.0, 99.0, 100.0])
def test_the_share_of_a_percentile_is_kept(percentile):
    x = inputs(1, (200, 5))
    found = calibrate(
        identity_of(5), run, [x], ["weight"], range="percentile", percentile=percentile
    )
    high = float(found.ranges["weight"])
    size = np.abs(np.asarray(x, np.float64))
    assert np.mean(size <= high) >= percentile / 100
    assert np.mean(size < high / (1 + WIDTH)) < percentile / 100


@pytest.mark.parametrize("outlier", [None, 50.0, 2000.0])
def test_the_range_of_least_error_is_nearly_the_best(outlier):
    x = np.array(inputs(2, (400, 5)))
    if outlier is not None:
        x[3, 2] = outlier
    found = calibrate(identity_of(5), run, [jnp.asarray(x)], ["weight"], range="mse")

    def error(high):
        step = high / 127
        return np.sum((np.clip(np.round(x / step), -127, 127) * step - x) ** 2)

    largest = np.max(np.abs(x))
    best = min(error(largest * 2.0**-k) for k in np.arange(0, 9, 1 / 64))
    assert error(float(found.ranges["weight"])) <= 1.1 * best


@pytest.mark.slow
def test_layers_of_a_scan_and_experts_have_ranges_of_their_own():
    make = lambda key: filled(MLP, 4, 6, d_out=4, seed=int(key), size=0.5)
    stack = jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0],
        *[make(seed) for seed in range(3)],
    )
    x = inputs(3, (2, 7, 4))

    def scanned(stack, x):
        arrays, static = eqx.partition(stack, eqx.is_array)
        step = lambda x, layer: (3 * eqx.combine(layer, static)(x), None)
        return jax.lax.scan(step, x, arrays)[0]

    found = calibrate(stack, scanned, [x], [".*up.*weight"])
    high = found.ranges["up_proj/weight"]
    for i in range(3):
        seen = np.max(np.abs(x))
        assert seen < high[i] <= seen * (1 + 2 * WIDTH)
        x = 3 * make(i)(x)

    moe = filled(MoE, 3, 4, 2, 5, seed=4, size=0.8)
    x = inputs(5, (30, 3))
    found = calibrate(moe, lambda m, x: m(x)[0], [x], ["up"])
    indices = np.asarray(moe(x)[1].indices)
    for e in range(4):
        mine = np.abs(np.asarray(x)[(indices == e).any(-1)])
        high = float(found.ranges["up"][e])
        assert mine.max() < high <= mine.max() * (1 + WIDTH)
        assert found.histograms["up"][e].sum() == mine.size


def test_zeros_have_a_step():
    found = calibrate(identity_of(5), run, [jnp.zeros((3, 5))], ["weight"])
    assert found.ranges["weight"] == 0
    assert found.steps["weight"] == 1
    for kind in ("percentile", "mse"):
        found = calibrate(
            identity_of(5), run, [jnp.zeros((3, 5))], ["weight"], range=kind
        )
        assert found.ranges["weight"] == 0


@pytest.mark.errors
def test_bad_arguments():
    layer, x = identity_of(5), inputs()
    with refused("range", "max"):
        calibrate(layer, run, [x], ["weight"], range="max")
    with refused("percentile", "40"):
        calibrate(layer, run, [x], ["weight"], percentile=40)
    with refused("weight", "not finite"):
        calibrate(layer, run, [x.at[1, 2].set(jnp.nan)], ["weight"])
    with refused("weight", "not finite"):
        calibrate(layer, run, [x.at[1, 2].set(-jnp.inf)], ["weight"])
