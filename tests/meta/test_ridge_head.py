"""Ridge regression in closed form, against NumPy, scikit-learn and known limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.derivatives import check_gradient, check_second_order
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.meta import ridge_head


RNG = np.random.default_rng(0)


def primal(x, y, log_lambda):
    d = x.shape[-1]
    return np.linalg.solve(x.T @ x + np.exp(log_lambda) * np.eye(d), x.T @ y)


def dual(x, y, log_lambda):
    n = x.shape[-2]
    return x.T @ np.linalg.solve(x @ x.T + np.exp(log_lambda) * np.eye(n), y)


def problem(n, d, k, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*batch, n, d)), rng.standard_normal((*batch, n, k))


def computed(x, y, log_lambda):
    with enable_x64(True):
        run = jax.jit(ridge_head)
        return np.asarray(run(jnp.asarray(x), jnp.asarray(y), jnp.asarray(log_lambda)))


@pytest.mark.parametrize(("n", "d"), [(3, 5), (5, 3)])
def test_both_forms_are_the_same_for_every_element_of_a_batch(n, d):
    x, y = problem(n, d, 2, batch=(2, 2))
    found = computed(x, y, -0.7)
    for at in np.ndindex(2, 2):
        for form in (primal, dual):
            want = form(x[at], y[at], -0.7)
            assert_close(found[at], want, dtype=np.float64, length=20)


@pytest.mark.slow
@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_any_shape(n, d, k, seed):
    x, y = problem(n, d, k, seed=seed)
    found = computed(x, y, -1.5)
    # Solutions may be small because the terms of `X' Y`, of order one, cancel.
    for form in (primal, dual):
        want = form(x, y, -1.5)
        assert_close(found, want, dtype=np.float64, length=100, terms=1)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d"), [(3, 5), (5, 3)])
def test_scikit_learn(n, d):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem(n, d, 2)
    model = linear_model.Ridge(alpha=np.exp(-0.7), fit_intercept=False).fit(x, y)
    np.testing.assert_allclose(computed(x, y, -0.7), model.coef_.T, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "left"), [(2, 3), (4, 1), (5, 0), (7, 0)])
def test_without_a_penalty_what_no_example_shows_stays_unknown(n, left):
    """E |w - w_hat|^2 = d - n over w ~ N(0, I), and 0 if n >= d.

    The mean is that over the unit vectors, whose answers are the columns for Y = X.
    """
    d, penalty = 5, 1e-13
    x = np.random.default_rng(n).standard_normal((n, d))
    errors = np.eye(d) - computed(x, x, np.log(penalty))
    # A singular value s leaves penalty / s^2 of its direction.
    spread = 2 * d * penalty / np.linalg.svd(x, compute_uv=False)[-1] ** 2
    assert abs(np.sum(errors**2) - left) < spread + 1e-9


def as_point(n, d):
    x, y = problem(n, d, 2)
    weights = RNG.standard_normal((d, 2))
    return {"x": x, "y": y, "log_lambda": np.array(-0.4)}, weights


@pytest.mark.parametrize(
    ("n", "d"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_derivatives_reach_examples_targets_and_penalty(n, d):
    point, weights = as_point(n, d)
    check_gradient(
        lambda p: jnp.sum(weights * ridge_head(p["x"], p["y"], p["log_lambda"])),
        lambda p: float(np.sum(weights * primal(p["x"], p["y"], p["log_lambda"]))),
        point,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 2)])
def test_second_derivatives(n, d):
    point, weights = as_point(n, d)
    check_second_order(
        lambda p: jnp.sum(weights * ridge_head(p["x"], p["y"], p["log_lambda"])),
        lambda p: float(np.sum(weights * primal(p["x"], p["y"], p["log_lambda"]))),
        point,
    )


@pytest.mark.slow
def test_bfloat16_is_solved_in_float32():
    x, y = (jnp.asarray(part, "bfloat16") for part in problem(4, 3, 2))
    found = jax.jit(ridge_head)(x, y, 0.5)
    assert found.dtype == jnp.bfloat16
    want = primal(np.asarray(x, "float64"), np.asarray(y, "float64"), 0.5)
    # The last rounding alone is that of bfloat16.
    assert_close(found, want, dtype=jnp.bfloat16, factor=0.6)
