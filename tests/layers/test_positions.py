"""Sinusoidal and learned positions against the formula in long double."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from support.numpy_oracles import sinusoidal_positions as waves
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.layers import LearnedPositions, sinusoidal_positions


# The error of an angle is that of four factors, one for each byte of a position.
TERMS = 4


@functools.cache
def sinusoids(d_model, base=10000.0, dtype=None):
    return jax.jit(lambda p: sinusoidal_positions(p, d_model, base, dtype))


@pytest.mark.parametrize("d_model", [1, 7, 64])
@given(
    position=st.one_of(
        st.integers(-(2**31), 2**31 - 1), st.integers(-5, 300), st.integers(0, 10**6)
    )
)
@example(position=0)
@example(position=-(2**31))
@example(position=2**31 - 1)
def test_sinusoids_at_any_position(d_model, position):
    """Far ones are as good as near ones: the angle is reduced exactly."""
    got = sinusoids(d_model)(jnp.asarray([position], "int32"))
    want = waves([position], d_model)
    assert got.dtype == jnp.float32
    assert_close(got, want, dtype="float32", length=TERMS, terms=1.0)


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_sinusoids_of_any_shape_and_base(shape, base):
    positions = np.random.default_rng(0).integers(0, 5000, shape)
    got = sinusoidal_positions(jnp.asarray(positions, "int32"), 6, base)
    want = waves(positions, 6, base)
    assert_close(got, want, dtype="float32", length=TERMS, terms=1.0)


def test_sinusoids_of_other_dtypes():
    positions = np.asarray([0, 3, 200], "uint8")
    want = waves(positions, 9)
    narrow = sinusoidal_positions(jnp.asarray(positions), 9, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert_rounded(narrow, want, length=TERMS)
    with enable_x64(True):
        got = sinusoidal_positions(jnp.asarray(positions), 9, dtype=jnp.float64)
        assert got.dtype == jnp.float64
        # An angle is rounded relative to itself.
        assert_close(got, want, dtype="float64", terms=200.0)


def test_sinusoids_turn_by_the_same_angle_everywhere():
    """Two positions differ by a rotation that depends on their distance alone."""
    p = np.asarray(sinusoidal_positions(jnp.arange(50), 8), "float64")
    pairs = p.reshape(50, 4, 2)
    z = pairs[..., 1] + 1j * pairs[..., 0]
    turned = z[7:] * np.conj(z[:-7])
    want = np.broadcast_to(turned[0], turned.shape)
    assert_close(turned, want, dtype="float32", length=TERMS)


def test_learned_positions_are_rows():
    layer = LearnedPositions(400, 30, key=jax.random.key(0))
    positions = np.asarray([[0, 399], [7, 7]], "uint16")
    got = layer(jnp.asarray(positions))
    np.testing.assert_array_equal(got, np.asarray(layer.weight)[positions])
    values = np.asarray(layer.weight, "float64").ravel()
    assert stats.kstest(values / 0.02, "norm").pvalue > 1e-3
    narrow = LearnedPositions(4, 3, jnp.bfloat16, key=jax.random.key(0))
    assert narrow(jnp.asarray(3)).dtype == jnp.bfloat16
