"""Rotary positions against complex numbers, and their scalings against the formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.attention_oracle import turned
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.layers import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    YaRNScaling,
    rotary,
    rotary_frequencies,
)


seeds = st.integers(0, 2**32 - 1)
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 64)
SCALINGS = {
    "none": None,
    "linear": LinearScaling(4.0),
    "ntk": NTKScaling(4.0),
    "yarn": YaRNScaling(4.0, 64, 8.0, 1.0),
    "llama3": LLAMA3,
}


def normal(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@given(base=st.sampled_from([10.0, 10000.0, 5e5]), seed=seeds)
def test_pairs_are_complex_numbers_turned_by_the_position(base, seed):
    x = normal((2, 5, 3, 6), seed)
    positions = np.random.default_rng(seed).integers(0, 300, (2, 5)).astype("int32")
    got = rotary(x, jnp.asarray(positions), base)
    want = np.empty(x.shape)
    for b, t, h in np.ndindex(2, 5, 3):
        row = np.asarray(x[b, t, h], "float64")
        want[b, t, h] = turned(row, int(positions[b, t]), base)
    # An angle of 300 has a spacing of 300 eps in float32.
    assert_close(got, want, dtype="float32", length=300**2)


@pytest.mark.parametrize("name", SCALINGS)
@given(shift=st.integers(0, 200), seed=seeds)
def test_products_depend_on_the_distance_alone(name, shift, seed):
    q, k = normal((4, 2, 8), seed), normal((4, 2, 8), seed + 1)
    at = jnp.asarray([0, 3, 17, 40], "int32")

    def products(at):
        turned = (rotary(x, at, 100.0, SCALINGS[name]) for x in (q, k))
        return jnp.einsum("qhd,khd->hqk", *turned)

    want, got = products(at), products(at + shift)
    assert_close(got, want, dtype="float32", length=240**2)


def test_lengths_stay_and_the_position_zero_does_nothing():
    x = normal((7, 2, 10), 0)
    turned = rotary(x, jnp.arange(7))
    assert_close(jnp.sum(turned**2, -1), jnp.sum(x**2, -1), dtype="float32", length=10)
    np.testing.assert_array_equal(turned[0], x[0])


def test_bfloat16_is_computed_in_float32():
    x = normal((50, 1, 4), 3, "bfloat16")
    got = rotary(x, jnp.arange(50))
    want = rotary(x.astype("float32"), jnp.arange(50))
    assert got.dtype == jnp.bfloat16
    assert_rounded(got, want)


@given(seed=seeds)
def test_gradient_is_the_turn_back(seed):
    x, g = normal((5, 2, 6), seed), normal((5, 2, 6), seed + 1)
    at = jnp.arange(5)
    slope = jax.vjp(lambda x: rotary(x, at), x)[1](g)[0]
    assert_close(slope, rotary(g, -at), dtype="float32", length=30)


def test_linear_scaling_divides_positions():
    x = normal((4, 1, 6), 1)
    got = rotary(x, jnp.arange(0, 16, 4), scaling=LinearScaling(4.0))
    assert_close(got, rotary(x, jnp.arange(4)), dtype="float32", length=20)


def test_ntk_scaling_keeps_the_fastest_pair_and_interpolates_the_slowest():
    plain, _ = rotary_frequencies(12, 1000.0)
    scaled, size = rotary_frequencies(12, 1000.0, NTKScaling(8.0))
    assert size == 1
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-14)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-13)
    assert np.all(np.diff(scaled / plain) < 0)


def test_llama3_scaling_by_wavelength():
    plain, _ = rotary_frequencies(32, 10000.0)
    scaled, size = rotary_frequencies(32, 10000.0, LLAMA3)
    assert size == 1
    for before, after in zip(plain, scaled, strict=True):
        wave = 2 * math.pi / before
        if wave < 64 / 4:
            want = before
        elif wave > 64 / 1:
            want = before / 8
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            want = (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(want, rel=1e-12)
    assert len({round(ratio, 6) for ratio in scaled / plain}) > 2


def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_scales_both():
    scaling = YaRNScaling(4.0, 64, 8.0, 1.0)
    plain, _ = rotary_frequencies(32, 10000.0)
    scaled, size = rotary_frequencies(32, 10000.0, scaling)
    assert size == pytest.approx(0.1 * math.log(4) + 1)
    turns = 64 * plain / (2 * math.pi)
    ratio = scaled / plain
    # The ramp begins at the whole pair below and ends at the one above.
    assert np.all(ratio[turns > 8 * 1.8] == 1)
    np.testing.assert_allclose(ratio[turns < 1 / 1.8], 1 / 4, rtol=1e-12)
    assert np.all(np.diff(ratio) <= 0)
    x = normal((3, 1, 32), 0)
    got = rotary(
        x, jnp.zeros(3, "int32"), scaling=scaling._replace(attention_factor=3.0)
    )
    assert_close(got, 3 * x, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"factor": 4.0}),
        (
            "yarn",
            {
                "factor": 4.0,
                "beta_fast": 8.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_scalings_are_those_of_transformers(name, options):
    transformers: Any = pytest.importorskip("transformers")
    rope: Any = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": name, "rope_theta": 10000.0, **options},
    )
    if name == "linear":
        want, factor = rope.ROPE_INIT_FUNCTIONS[name](config, "cpu")
    else:
        want, factor = rope.ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=256)
    got, size = rotary_frequencies(32, 10000.0, SCALINGS[name])
    assert size == pytest.approx(factor)
    assert_close(got, want.numpy(), dtype="float32")
