"""The noise schedule against products, recursions and published grids."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.diffusion_oracle import alpha_bars
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.layers import NoiseSchedule


seeds = st.integers(0, 2**32 - 1)


@given(
    steps=st.integers(1, 1200),
    start=st.floats(1e-5, 0.3),
    end=st.floats(1e-5, 0.3),
)
def test_what_is_left_of_the_signal(steps, start, end):
    got = NoiseSchedule(steps, start, end).alpha_bar()
    want = np.asarray(alpha_bars(steps, start, end))
    assert got.dtype == np.float64
    assert_close(got, want, dtype="float64", length=steps)
    assert np.all(np.diff(got) < 0)
    assert 0 < got[-1] <= got[0] < 1


def test_the_schedule_of_the_paper_ends_in_noise():
    kept = NoiseSchedule().alpha_bar()
    # Section 4 of 2006.11239: about 1e-5 bits a dimension tell x_T from noise, for
    # data in [-1, 1]; here for a value in the middle of each half.
    left = kept[-1]
    divergence = 0.5 * (1 - left + left * 0.25 - 1 - math.log(1 - left)) / math.log(2)
    assert 2e-6 < divergence < 2e-5


@given(steps=st.sampled_from([1, 13]), seed=seeds)
def test_noise_is_what_single_steps_add_up_to(steps, seed):
    """Mean and variance of q(x_t | x_0) by the definition of one step."""
    schedule = NoiseSchedule(steps, 0.01, 0.3)
    betas = np.linspace(0.01, 0.3, steps)
    x0 = np.random.default_rng(seed).standard_normal(3)
    means, variances, variance = [x0], [], 0.0
    for beta in betas:
        means.append(np.sqrt(1 - beta) * means[-1])
        variance = (1 - beta) * variance + beta
        variances.append([variance] * 3)
    with enable_x64(True):
        rows = jnp.broadcast_to(jnp.asarray(x0), (steps, 3))
        nothing, t = jnp.zeros_like(rows), jnp.arange(steps)
        mean = schedule.add_noise(rows, nothing, t)
        spread = schedule.add_noise(nothing, jnp.ones_like(rows), t)
        assert_close(mean, np.asarray(means[1:]), dtype="float64", length=steps)
        assert_close(spread**2, np.asarray(variances), dtype="float64", length=steps)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_moments_of_noisy_values(t):
    kept = alpha_bars(1000)[t]
    count = 40_000
    x0 = jnp.broadcast_to(jnp.asarray([1.5, -0.5]), (count, 2))
    noise = jax.random.normal(jax.random.key(t), x0.shape)
    x_t = np.asarray(NoiseSchedule().add_noise(x0, noise, jnp.asarray(t)), "float64")
    spread = math.sqrt(1 - kept)
    mean = math.sqrt(kept) * np.asarray(x0[0])
    # Five standard errors.
    assert np.all(abs(x_t.mean(0) - mean) < 5 * spread / math.sqrt(count))
    assert np.all(abs(x_t.std(0) / spread - 1) < 5 / math.sqrt(2 * count))


def test_a_time_for_each_vector_or_one_for_all():
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 2, 3, 5)).astype("float32")
    t = rng.integers(0, 100, (2, 3))
    schedule = NoiseSchedule(100)
    kept = np.asarray(alpha_bars(100))[t][..., None]
    want = np.sqrt(kept) * x0 + np.sqrt(1 - kept) * noise
    arrays = jnp.asarray(x0), jnp.asarray(noise)
    got = jax.jit(schedule.add_noise)(*arrays, jnp.asarray(t, "int32"))
    assert_close(got, want, dtype="float32")
    one = schedule.add_noise(*arrays, jnp.asarray(t[1, 2], "uint8"))
    assert_close(one[1, 2], want[1, 2], dtype="float32")
    assert_close(one[0, 0], want_at(t[1, 2], x0[0, 0], noise[0, 0]), dtype="float32")


def want_at(t, x0, noise):
    kept = alpha_bars(100)[t]
    return math.sqrt(kept) * x0 + math.sqrt(1 - kept) * noise


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(1)
    x0, noise = (
        jnp.asarray(rng.standard_normal((4, 3)), kind) for kind in ("bfloat16", "f4")
    )
    got = NoiseSchedule(100).add_noise(x0, noise, jnp.asarray(40))
    assert got.dtype == jnp.bfloat16
    want = want_at(40, np.asarray(x0, "float64"), np.asarray(noise, "float64"))
    assert_rounded(got, want)


@pytest.mark.parametrize("t", [-1, -7, 10, 2**31 - 1])
def test_a_time_outside_gives_nan(t):
    ones = jnp.ones((2, 3))
    times = jnp.asarray([t, 9], "int32")
    got = np.asarray(NoiseSchedule(10).add_noise(ones, ones, times))
    assert np.all(np.isnan(got[0]))
    assert np.all(np.isfinite(got[1]))


def test_the_grids_of_twelve_steps():
    schedule = NoiseSchedule(1000)
    leading = [913, 830, 747, 664, 581, 498, 415, 332, 249, 166, 83, 0]
    linspace = [999, 916, 832, 749, 666, 583, 500, 416, 333, 250, 166, 83]
    assert schedule.timesteps(12).tolist() == leading
    assert schedule.timesteps(12, "linspace").tolist() == linspace
    assert NoiseSchedule(1).timesteps(1, "linspace").tolist() == [0]


@given(data=st.data(), total=st.integers(1, 60))
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_grid_falls_through_different_times(spacing, data, total):
    most = total if spacing == "leading" else max(total - 1, 1)
    count = data.draw(st.integers(1, most))
    times = NoiseSchedule(total).timesteps(count, spacing)
    assert len(times) == count
    assert np.all(np.diff(times) < 0)
    assert times[0] < total
    assert times[-1] >= 0
    if spacing == "leading":
        assert times[-1] == 0
        assert set(np.diff(times).tolist()) <= {-(total // count)}
    else:
        assert times[0] == total - 1
        exact = (total - 1) / count
        assert np.all(abs(times - exact * np.arange(count, 0, -1)) <= 0.5)


def test_nothing_of_it_can_be_trained():
    assert jax.tree.leaves(NoiseSchedule()) == []
