import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import eval_legendre
from support.precision import enable_x64

from capibara_eqx.layers import hippo_diagonal, hippo_initialization, hippo_matrices


@pytest.fixture(autouse=True)
def _wide():
    with enable_x64(True):
        yield


def history(t):
    """A polynomial, which a few coefficients hold exactly."""
    return 1 - 2 * t + 0.5 * t**2


def coefficients(n, start, t):
    """The normalised Legendre coefficient of the history on `[start, t]`."""
    span = t - start
    integral = quad(
        lambda s: history(s) * eval_legendre(n, 2 * (s - start) / span - 1), start, t
    )[0]
    return np.sqrt(2 * n + 1) * integral / span


@pytest.mark.parametrize("d_state", [3, 6])
@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_state_is_the_legendre_coefficients(measure, d_state):
    """They obey the equation of the system, where their time derivative is a quotient
    of differences: exact for LegS and LegT, since the history is a polynomial."""
    A, B = (
        np.asarray(part, "float64")
        for part in hippo_matrices(d_state, measure, "float64")
    )
    t, eps = 1.7, 1e-4
    start = {"legs": lambda t: 0.0, "legt": lambda t: t - 1}[measure]
    rate = {"legs": 1 / t, "legt": 1.0}[measure]

    def state(t):
        return np.array([coefficients(n, start(t), t) for n in range(d_state)])

    change = (state(t + eps) - state(t - eps)) / (2 * eps)
    np.testing.assert_allclose(
        change, rate * (A @ state(t) + B * history(t)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("d_state", [1, 7, 32])
def test_eigenvalues_of_legs_are_the_first_negative_integers(d_state):
    A = np.asarray(hippo_initialization(d_state, dtype="float64"))
    np.testing.assert_array_equal(np.diag(A), -np.arange(1, d_state + 1))
    np.testing.assert_array_equal(np.triu(A, 1), 0)


@pytest.mark.parametrize("d_state", [2, 6, 64])
@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_diagonal_split_gives_the_matrix_back(measure, d_state):
    split = hippo_diagonal(d_state, measure, "float64")
    A, B = hippo_matrices(d_state, measure, "float64")
    eigenvalues, P, b, V = (np.asarray(part, "complex128") for part in split)
    low = 2 * np.real(V @ P)
    whole = 2 * np.real(V * eigenvalues @ V.conj().T) - low @ low.T
    scale = np.abs(A).max()
    np.testing.assert_allclose(whole, A, rtol=0, atol=1e-13 * d_state * scale)
    np.testing.assert_allclose(2 * np.real(V @ b), B, rtol=1e-12)
    np.testing.assert_allclose(
        V.conj().T @ V, np.eye(d_state // 2), atol=1e-13 * d_state
    )
    assert np.all(np.imag(eigenvalues) > 0)
    assert np.all(np.real(b) > 0)


def test_real_parts_of_the_split_are_those_of_the_papers():
    assert np.allclose(hippo_diagonal(8, "legs", "float64").eigenvalues.real, -0.5)
    assert np.allclose(hippo_diagonal(8, "legt", "float64").eigenvalues.real, 0)


def test_results_are_float32_unless_asked_for():
    assert hippo_initialization(4).dtype == "float32"
    assert hippo_diagonal(4).P.dtype == "complex64"
    assert hippo_diagonal(4, dtype="float64").P.dtype == "complex128"


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`d_state` must be a positive integer, got 0"),
        ((3,), "`d_state` must be even, got 3"),
        ((4, "legz"), "Did you mean 'leg"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hippo_diagonal(*arguments)
