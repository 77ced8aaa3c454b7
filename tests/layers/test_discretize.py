"""Steps of continuous systems, against SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from support.derivatives import check_first_order, check_second_order
from support.linear_ssm_oracle import discretized
from support.precision import enable_x64
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.layers import hippo_matrices
from capibara_eqx.layers._discretize import DISCRETIZATIONS, discretize
from capibara_eqx.layers._discretize_dense import discretize_dense


both = pytest.mark.parametrize("method", DISCRETIZATIONS)

# From fast to none, on the unit circle, and on both sides of where the series ends.
DIAGONAL = np.array(
    [-30.0, -1.0 + 4j, -0.5 + 3j, -0.49, 1e-3j, -1e-9, 0.0, 2j * np.pi, -0.3 + 0.4j]
)


def scipy_factor(A, dt, method):
    """What B is multiplied with, from a system whose B is the identity."""
    return discretized(A, np.eye(len(A)), dt, method)


def real_system(values):
    """A matrix with these eigenvalues and their conjugates."""
    blocks = [np.array([[v.real, v.imag], [-v.imag, v.real]]) for v in values]
    A = np.zeros((2 * len(values), 2 * len(values)))
    for k, block in enumerate(blocks):
        A[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = block
    return A


@both
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_a_diagonal_is_that_of_scipy(method, dtype):
    with enable_x64(dtype == "complex128"):
        A = jnp.asarray(DIAGONAL, dtype)
        got = jax.jit(lambda A, dt: discretize(A, dt, method))(
            A, jnp.full(A.shape, 0.9)
        )
        for part, dense in zip(
            got, scipy_factor(real_system(np.asarray(A)), 0.9, method), strict=True
        ):
            want = dense[::2, ::2].diagonal() + 1j * dense[::2, 1::2].diagonal()
            assert part.dtype == dtype
            for g, w in zip(np.asarray(part), want, strict=True):
                # Each by itself; e^30 that is nearly zero is compared with 1.
                assert_close(g, w, dtype=dtype, terms=1.0)


@both
def test_derivatives_of_a_diagonal(method):
    """Also at the point where a quotient would be 0/0."""

    def weighted(parts):
        A_bar, factor = parts
        return ((A_bar * (1 + 2j) + factor * (2 - 1j) * A_bar).real).sum()

    def function(point):
        A = jax.lax.complex(point["re"], point["im"])
        return weighted(discretize(A, jnp.exp(point["log_dt"]), method))

    def oracle(point):
        A, dt = point["re"] + 1j * point["im"], np.exp(point["log_dt"])
        if method == "bilinear":
            half = A * dt / 2
            return weighted(((1 + half) / (1 - half), dt / (1 - half)))
        # An integral that knows nothing of quotients: Gauss-Legendre, exact here.
        nodes, weights = np.polynomial.legendre.leggauss(12)
        rays = np.exp((A * dt)[:, None] * (nodes + 1) / 2)
        return weighted((np.exp(A * dt), rays @ weights / 2 * dt))

    point = {
        "re": np.array([0.0, 1e-5, 0.2, -0.6]),
        "im": np.array([0.0, 0.0, -0.1, 0.3]),
        "log_dt": np.full(4, -0.1),
    }
    check_first_order(function, oracle, point)
    check_second_order(function, oracle, point)


@both
@pytest.mark.parametrize("dt", [1e-3, 0.1, 1.0])
def test_hippo_in_float32_keeps_its_digits(method, dt):
    """The exponential squares its way up, which costs digits: as documented."""
    A = np.asarray(hippo_matrices(32).A, "float64")
    got = jax.jit(lambda A, dt: discretize_dense(A, dt, method))(
        jnp.asarray(A, "float32"), jnp.float32(dt)
    )
    norm = np.abs(dt * A).sum(axis=0).max()
    for part, want in zip(
        got, scipy_factor(A, float(np.float32(dt)), method), strict=True
    ):
        error = np.abs(part - want).max() / np.abs(want).max()
        assert error < EPSILONS["float32"] * max(norm, 8)


@both
def test_a_matrix_without_an_inverse(method):
    A = np.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]])

    @jax.jit
    def run(A, dt):
        def total(A, dt):
            return sum(jnp.sum(part) for part in discretize_dense(A, dt, method))

        return discretize_dense(A, dt, method), jax.grad(total, (0, 1))(A, dt)

    got, gradient = run(jnp.asarray(A, "float32"), jnp.float32(0.3))
    for part, want in zip(got, scipy_factor(A, 0.3, method), strict=True):
        assert_close(part, want, dtype="float32", length=9)
    # At zero the state is the sum of what came in.
    (A_bar, factor), zero_gradient = run(jnp.zeros((3, 3)), jnp.float32(0.3))
    assert_close(A_bar, np.eye(3), dtype="float32")
    assert_close(factor, 0.3 * np.eye(3), dtype="float32")
    for leaf in (*gradient, *zero_gradient):
        assert np.all(np.isfinite(leaf))


@pytest.mark.slow
def test_second_derivatives_of_an_exponential():
    weights = np.random.default_rng(0).standard_normal((2, 3, 3))

    def function(point):
        parts = discretize_dense(point["A"], jnp.exp(point["log_dt"]), "zoh")
        return jnp.sum(jnp.stack(parts) * weights)

    def oracle(point):
        whole = np.zeros((6, 6))
        whole[:3] = np.exp(point["log_dt"]) * np.hstack([point["A"], np.eye(3)])
        above = expm(whole)[:3]
        return np.sum(weights[0] * above[:, :3]) + np.sum(weights[1] * above[:, 3:])

    # Large enough to need squarings.
    A = np.asarray(hippo_matrices(3).A, "float64")
    check_second_order(function, oracle, {"A": A, "log_dt": np.asarray(0.5)})
