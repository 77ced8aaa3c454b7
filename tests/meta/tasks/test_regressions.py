"""Sines and linear maps: what is drawn follows the distributions that are promised."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from capibara_eqx.meta.tasks import sample_linear_regressions, sample_sinusoids


SEEDS = st.integers(0, 2**32 - 1)
# So rarely does a right sampler fail a test.
CHANCE = 1e-9
EPS = float(np.finfo(np.float32).eps)


sines = jax.jit(partial(sample_sinusoids, num_tasks=500, shots=9, queries=7))
maps = jax.jit(
    partial(sample_linear_regressions, num_tasks=1000, d_in=3, shots=4, queries=5)
)


def float64(task):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), task)


def amplitude_and_phase(x, y):
    """Of A sin(x - p) = a sin x + b cos x with a = A cos p, b = -A sin p."""
    waves = np.stack([np.sin(x), np.cos(x)], axis=-1)
    (a, b), *_ = np.linalg.lstsq(waves, y, rcond=None)
    return np.hypot(a, b), np.arctan2(-b, a)


@given(seed=SEEDS)
def test_all_points_of_a_task_lie_on_one_sine(seed):
    task = float64(sines(jax.random.key(seed)))
    for index in range(3):
        x, y = (part[index, :, 0] for part in task.support)
        x_query, y_query = (part[index, :, 0] for part in task.query)
        amplitude, phase = amplitude_and_phase(
            np.concatenate([x, x_query]), np.concatenate([y, y_query])
        )
        # A few roundings of inputs up to 8 and of values up to 5.
        largest = 40 * EPS
        np.testing.assert_allclose(y, amplitude * np.sin(x - phase), atol=largest)
        np.testing.assert_allclose(
            y_query, amplitude * np.sin(x_query - phase), atol=largest
        )
        assert 0.1 - largest <= amplitude <= 5 + largest
        # A phase near zero, of a small amplitude, is known to fewer digits.
        slack = largest / amplitude
        assert -slack <= phase <= np.pi + slack
        assert np.abs(np.concatenate([x, x_query])).max() <= 5


def test_amplitude_phase_and_inputs_are_uniform(getkey):
    task = float64(sines(getkey()))
    pairs = [
        amplitude_and_phase(x[:, 0], y[:, 0])
        for x, y in zip(*task.support, strict=True)
    ]
    amplitudes, phases = np.array(pairs).T
    for found, low, high in (
        (amplitudes, 0.1, 5.0),
        (phases, 0.0, np.pi),
        (task.support[0].ravel(), -5, 5),
        (task.query[0].ravel(), -5, 5),
    ):
        assert stats.kstest(found, "uniform", (low, high - low)).pvalue > CHANCE
    assert abs(np.corrcoef(amplitudes, phases)[0, 1]) < 6 / np.sqrt(500)


def test_a_grid_of_queries_is_even(getkey):
    sample = partial(sample_sinusoids, num_tasks=2, shots=9, queries=7, grid=True)
    task = float64(jax.jit(sample)(getkey()))
    x, _ = task.query
    np.testing.assert_allclose(x[0, :, 0], np.linspace(-5, 5, 7), rtol=1e-6)
    np.testing.assert_array_equal(x[0], x[1])
    for index in range(2):
        points = [part[index, :, 0] for part in task.query]
        seen = [part[index, :, 0] for part in task.support]
        np.testing.assert_allclose(
            amplitude_and_phase(*points), amplitude_and_phase(*seen), rtol=1e-3
        )


@given(seed=SEEDS)
def test_all_points_of_a_task_lie_on_one_plane(seed):
    task = float64(maps(jax.random.key(seed)))
    for index in range(2):
        x = np.concatenate([task.support[0][index], task.query[0][index]])
        y = np.concatenate([task.support[1][index], task.query[1][index]])
        weights, *_ = np.linalg.lstsq(x, y, rcond=None)
        # Sums of three products, of numbers of about 4 at most.
        rounding = 3 * 16 * 4 * EPS
        np.testing.assert_allclose(x @ weights, y, atol=rounding)


def test_weights_and_inputs_are_normal(getkey):
    task = float64(maps(getkey()))
    weights = np.array(
        [
            np.linalg.lstsq(x, y, rcond=None)[0][:, 0]
            for x, y in zip(*task.support, strict=True)
        ]
    )
    for found in (weights, task.support[0], task.query[0]):
        assert stats.kstest(found.ravel(), "norm").pvalue > CHANCE
    # The covariance is the identity: means of 1000 products deviate by 1/sqrt(1000),
    # of squares by sqrt(2) as much.
    covariance = weights.T @ weights / 1000
    np.testing.assert_allclose(covariance, np.eye(3), atol=6 * np.sqrt(2 / 1000))


def test_one_step_of_the_best_rate_leaves_the_known_error(getkey):
    """N / (N + d + 1), which leaves d (d + 1) / (N + d + 1)."""
    shots, d_in, num_tasks = 4, 3, 1000
    x, y = float64(maps(getkey())).support
    # The weights: of the support of a task there are more equations than unknowns.
    weights = np.linalg.pinv(x) @ y
    after = shots / (shots + d_in + 1) * np.swapaxes(x, 1, 2) @ y / shots
    left = ((weights - after) ** 2).sum(axis=(1, 2))
    expected = d_in * (d_in + 1) / (shots + d_in + 1)
    assert abs(left.mean() - expected) < 6 * left.std() / np.sqrt(num_tasks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sample",
    [
        partial(sample_sinusoids, num_tasks=3, shots=9, queries=7),
        partial(sample_linear_regressions, num_tasks=3, d_in=3, shots=4, queries=5),
    ],
)
def test_a_key_gives_the_same_tasks_inside_of_jit(sample, getkey):
    key, other = getkey(), getkey()
    eager = sample(key)
    leaves = zip(
        jax.tree.leaves(eager),
        jax.tree.leaves(jax.jit(sample)(key)),
        jax.tree.leaves(sample(other)),
        strict=True,
    )
    for a, b, c in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert not np.isclose(a, c).any(axis=(1, 2)).all()
    sizes = [part.shape[:2] for part in (*eager.support, *eager.query)]
    shots = sizes[0][1]
    assert sizes == [(3, shots)] * 2 + [(3, sizes[2][1])] * 2
