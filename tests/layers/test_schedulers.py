"""Chains of denoising against the papers' formulas and against known solutions."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import diffusion_oracle as oracle
from support.derivatives import check_first_order, check_second_order
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.layers import (
    DenoiseState,
    NoiseSchedule,
    SamplingSchedule,
    denoise,
    denoise_step,
)


ALL = pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm"])
# Mean and variance of Gaussian data.
MEAN, VARIANCE = 0.7, 0.09


def kept(schedule) -> list[float]:
    """Alpha-bar at the times of a chain, by the oracle."""
    bars = oracle.alpha_bars(schedule.noise.num_train_timesteps)
    return [bars[t] for t in schedule.timesteps()]


def run(schedule, x, epsilons, noises) -> list:
    """A chain with given predictions, one step at a time."""
    state, out = DenoiseState.start(x), []
    for eps, noise in zip(epsilons, noises, strict=True):
        x, state = denoise_step(schedule, state, x, eps, noise)
        out.append(x)
    return out


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddpm", {}),
        ("ddim", {}),
        ("ddim", {"eta": 0.6}),
        ("ddim", {"eta": 1.0}),
        ("dpm", {}),
        ("dpm", {"spacing": "leading"}),
    ],
)
@pytest.mark.parametrize(("total", "steps"), [(1000, 12), (37, 3), (9, 2), (5, 1)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_step_is_that_of_the_paper(scheduler, options, total, steps, dtype):
    schedule = SamplingSchedule(NoiseSchedule(total), steps, scheduler, **options)
    rng = np.random.default_rng(total)
    x = rng.standard_normal((3, 2)).astype(dtype)
    draws = rng.standard_normal((2, steps, 3, 2)).astype(dtype)
    want = oracle.chain(
        scheduler,
        kept(schedule),
        x.astype("float64"),
        list(draws[0].astype("float64")),
        list(draws[1].astype("float64")),
        options.get("eta", 0.0),
    )
    with enable_x64(dtype == "float64"):
        got = run(
            schedule, jnp.asarray(x), jnp.asarray(draws[0]), jnp.asarray(draws[1])
        )
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.dtype == dtype
            # The oracle takes the logarithm of what is left of the signal.
            assert_close(a, b, dtype=dtype, length=100, name=f"step {i}")


def bend(x, t):
    """A prediction of the noise that is no straight line."""
    return np.tanh(x) * 0.8 + 0.1 * t / 1000


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_the_loop_is_the_steps_one_after_the_other(scheduler):
    schedule = SamplingSchedule(NoiseSchedule(), 6, scheduler)
    x = np.random.default_rng(0).standard_normal((2, 3))
    times = schedule.timesteps()
    want = oracle.sample(scheduler, kept(schedule), x, lambda x, i: bend(x, times[i]))

    def predict(x, t):
        return jnp.tanh(x) * 0.8 + 0.1 * t.astype(x.dtype) / 1000

    with enable_x64(True):
        together = jax.jit(functools.partial(denoise, schedule, predict))
        got = together(jnp.asarray(x))
        assert_close(got, want, dtype="float64", length=100)
        rows = jax.vmap(together)(jnp.asarray(x))
        assert_close(rows, want, dtype="float64", length=100)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_derivatives_of_a_chain(scheduler):
    schedule = SamplingSchedule(NoiseSchedule(100), 4, scheduler)
    rng = np.random.default_rng(1)
    point = {"x": rng.standard_normal(3), "w": 0.4 * rng.standard_normal((3, 3))}
    out = rng.standard_normal(3)

    def function(p):
        def predict(x, t):
            return jnp.tanh(p["w"] @ x + t.astype(x.dtype) / 100)

        return jnp.sum(jnp.asarray(out) * denoise(schedule, predict, p["x"]))

    def loop(p):
        times = schedule.timesteps()

        def predict(x, i):
            return np.tanh(p["w"] @ x + times[i] / 100)

        return float(out @ oracle.sample(scheduler, kept(schedule), p["x"], predict))

    check_first_order(function, loop, point)
    check_second_order(function, loop, point)


@ALL
@pytest.mark.parametrize("steps", [1, 5])
def test_a_single_point_is_found(scheduler, steps):
    """Data that are one point: the noise is known, and every chain ends there."""
    schedule = SamplingSchedule(NoiseSchedule(), steps, scheduler)
    point = np.asarray([1.3, -2.5])
    bars = np.asarray(oracle.alpha_bars(1000))

    def predict(x, t):
        a = jnp.asarray(np.sqrt(bars), x.dtype)[t]
        s = jnp.asarray(np.sqrt(1 - bars), x.dtype)[t]
        return (x - a * jnp.asarray(point, x.dtype)) / s

    with enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2,), "float64")
        chain = jax.jit(functools.partial(denoise, schedule, predict))
        got = chain(x, key=jax.random.key(1))
        # 1 / a is about a hundred at the first time.
        assert_close(got, point, dtype="float64", length=100)


def gaussian_noise(a, s, x):
    """The expected noise in x_t where the data are Gaussian."""
    return s * (x - a * MEAN) / (a * a * VARIANCE + s * s)


def moments(schedule) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance after each step, from the exact marginal at the first time.

    With Gaussian data a step is affine in x and in its noise: three points show it.
    """
    bars = kept(schedule)
    a, s = math.sqrt(bars[0]), math.sqrt(1 - bars[0])
    low, high = a * MEAN, a * MEAN + math.sqrt(a * a * VARIANCE + s * s)
    variance = 0.0
    means, variances = [], []
    with enable_x64(True):
        x: Any = np.asarray([low, high, low])
        noise = jnp.asarray([0.0, 0.0, 1.0])
        state = DenoiseState.start(jnp.asarray(x))
        step = jax.jit(functools.partial(denoise_step, schedule))
        for bar in bars:
            eps = gaussian_noise(math.sqrt(bar), math.sqrt(1 - bar), x)
            before = x[1] - x[0]
            after, state = step(state, jnp.asarray(x), jnp.asarray(eps), noise)
            x = np.array(after)
            variance = ((x[1] - x[0]) / before) ** 2 * variance + (x[2] - x[0]) ** 2
            x[2] = x[0]
            means.append(x[0])
            variances.append((x[1] - x[0]) ** 2 + variance)
    return np.asarray(means), np.asarray(variances)


@pytest.mark.parametrize(
    ("scheduler", "eta", "error"),
    [
        ("ddpm", 0.0, 0.05),
        ("ddim", 0.0, 0.02),
        ("ddim", 0.5, 0.03),
        ("dpm", 0.0, 0.003),
    ],
)
def test_gaussian_data_come_back(scheduler, eta, error):
    errors = []
    for steps in (250, 500):
        schedule = SamplingSchedule(NoiseSchedule(), steps, scheduler, eta)
        means, variances = moments(schedule)
        assert abs(means[-1] - MEAN) < 1e-9
        errors.append(abs(variances[-1] / VARIANCE - 1))
    assert errors[1] < error
    # Of first order; the solver's small error is that of its last time, which is not 0.
    assert scheduler == "dpm" or errors[1] < errors[0] / 1.7


@pytest.mark.parametrize(("scheduler", "order"), [("ddim", 1), ("dpm", 2)])
def test_the_order_of_the_error(scheduler, order):
    """Twice the steps, half or a quarter of the error, a third of the way to the data.

    There the exact flow is known: it keeps x a fixed number of deviations away.
    """
    errors = []
    for steps in (24, 48, 96):
        # So many times that all three grids share the one at two thirds.
        schedule = SamplingSchedule(NoiseSchedule(1153), steps, scheduler)
        schedule = SamplingSchedule(
            schedule.noise, steps, scheduler, spacing="linspace"
        )
        index = steps * 2 // 3
        bar = kept(schedule)[index]
        exact = math.sqrt(bar * VARIANCE + 1 - bar)
        errors.append(abs(math.sqrt(moments(schedule)[1][index - 1]) - exact))
    ratios = np.asarray(errors[:-1]) / np.asarray(errors[1:])
    assert np.all(abs(np.log2(ratios) - order) < 0.2), ratios


@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_order_solver_is_ddim(steps):
    """Both steps of a chain of two are of first order."""
    noise = NoiseSchedule()
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((4,)), "float32")
    eps = jnp.asarray(rng.standard_normal((steps, 4)), "float32")
    none = [None] * steps
    chains = [
        run(SamplingSchedule(noise, steps, name, spacing="linspace"), x, eps, none)
        for name in ("dpm", "ddim")
    ]
    for a, b in zip(*chains, strict=True):
        assert_close(a, b, dtype="float32", length=10)


def test_three_steps_of_the_solver_are_not_ddim():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((4,)), "float32")
    eps = jnp.asarray(rng.standard_normal((3, 4)), "float32")
    first, second = (
        run(SamplingSchedule(NoiseSchedule(), 3, n, spacing="linspace"), x, eps, eps)
        for n in ("dpm", "ddim")
    )
    assert_close(first[0], second[0], dtype="float32", length=10)
    assert np.max(abs(np.asarray(first[1] - second[1]))) > 0.05


def test_ddim_with_all_its_noise_is_ddpm():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((4,)), "float32")
    draws = jnp.asarray(rng.standard_normal((2, 7, 4)), "float32")
    first, second = (
        run(SamplingSchedule(NoiseSchedule(), 7, name, eta=eta), x, *draws)
        for name, eta in (("ddim", 1.0), ("ddpm", 0.0))
    )
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, dtype="float32", length=10)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_the_loop_draws_new_noise_at_every_step(scheduler):
    schedule = SamplingSchedule(
        NoiseSchedule(), 20, scheduler, eta=0.0 if scheduler == "ddpm" else 0.7
    )
    bars = np.asarray(oracle.alpha_bars(1000), "float32")
    first = kept(schedule)[0]

    def predict(x, t):
        bar = jnp.asarray(bars)[t]
        return gaussian_noise(jnp.sqrt(bar), jnp.sqrt(1 - bar), x)

    count = 20_000
    normal = jax.random.normal(jax.random.key(5), (count,))
    spread = math.sqrt(first * VARIANCE + 1 - first)
    start = math.sqrt(first) * MEAN + spread * normal
    loop = jax.jit(functools.partial(denoise, schedule, predict))
    got = np.asarray(loop(start, key=jax.random.key(6)), "float64")
    means, variances = moments(schedule)
    # Five standard errors. Noise that repeats itself would add up to another variance.
    assert abs(got.mean() - means[-1]) < 5 * math.sqrt(variances[-1] / count)
    assert abs(got.var() / variances[-1] - 1) < 5 * math.sqrt(2 / count)
    again = np.asarray(loop(start, key=jax.random.key(6)))
    np.testing.assert_array_equal(again, got.astype("float32"))
    assert np.any(np.asarray(loop(start, key=jax.random.key(7))) != again)


@ALL
def test_clipping_is_off_unless_asked_for(scheduler):
    rng = np.random.default_rng(7)
    x = jnp.asarray(10 * rng.standard_normal((5,)), "float32")
    eps, noise = (jnp.asarray(rng.standard_normal((5,)), "float32") for _ in range(2))

    def last(bound):
        schedule = SamplingSchedule(NoiseSchedule(), 1, scheduler, clip_x0=bound)
        return np.asarray(run(schedule, x, [eps], [noise])[0])

    free = last(None)
    assert np.max(abs(free)) > 2
    np.testing.assert_array_equal(last(1e6), free)
    clipped = last(0.5)
    # The one step ends at the prediction itself.
    assert_close(clipped, np.clip(free, -0.5, 0.5), dtype="float32", length=10)


@ALL
def test_bfloat16_is_computed_wide(scheduler):
    schedule = SamplingSchedule(NoiseSchedule(), 3, scheduler)
    rng = np.random.default_rng(8)
    x, eps, noise = (jnp.asarray(rng.standard_normal(6), "bfloat16") for _ in range(3))
    state = DenoiseState.start(x)
    assert state.x0.dtype == jnp.float32
    got, state = denoise_step(schedule, state, x, eps, noise)
    wide, _ = denoise_step(
        schedule, DenoiseState.start(x), *(v.astype("float32") for v in (x, eps, noise))
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wide.astype("bfloat16"))
    assert state.x0.dtype == jnp.float32
    chain = jax.jit(functools.partial(denoise, schedule, lambda x, t: 0.5 * x))
    whole = chain(x, key=jax.random.key(0))
    assert whole.dtype == jnp.bfloat16


@ALL
def test_a_step_after_the_last_gives_nan(scheduler):
    schedule = SamplingSchedule(NoiseSchedule(), 2, scheduler)
    x = jnp.ones((3,))
    out = []
    state = DenoiseState.start(x)
    for _ in range(3):
        x, state = denoise_step(schedule, state, x, x, x)
        out.append(np.asarray(x))
    assert np.all(np.isfinite(out[:2]))
    assert np.all(np.isnan(out[2]))


def test_which_chains_draw():
    noise = NoiseSchedule()
    assert SamplingSchedule(noise, 12, "ddpm").stochastic
    assert SamplingSchedule(noise, 12, "ddim", eta=0.1).stochastic
    assert not SamplingSchedule(noise, 12, "ddim").stochastic
    assert not SamplingSchedule(noise, 12, "dpm").stochastic
    assert jax.tree.leaves(SamplingSchedule(noise)) == []
