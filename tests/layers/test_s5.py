"""S5's values and derivatives, against SciPy's simulation of a real system."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support.derivatives import check_first_order, check_second_order
from support.layer_cases import packed_rows, seeds
from support.numpy_oracles import documents
from support.precision import enable_x64
from support.quick import filled
from support.s5_oracle import parameters, s5_row, with_parameters
from support.tolerances import assert_close

from capibara_eqx.layers import S5


CONFIGS: dict[str, dict[str, Any]] = {
    "zoh": {"d_model": 3, "d_state": 4},
    "bilinear": {"d_model": 2, "d_state": 6, "discretization": "bilinear"},
    "clipped": {"d_model": 1, "d_state": 4, "clip_eigenvalues": True},
}


@functools.cache
def make(name):
    """A layer of order one that decays, but for an eigenvalue that will be clipped."""
    layer = filled(S5, **CONFIGS[name], seed=0, size=0.5)
    real, imag = layer.eigenvalues.T
    real = -jnp.abs(real) - 0.1
    if layer.clip_eigenvalues:
        real = real.at[0].set(0.3)
    pairs = jnp.stack([real, 2 * imag], axis=-1)
    return eqx.tree_at(lambda m: m.eigenvalues, layer, pairs)


def point_of(layer, seed, seq):
    """Parameters, input and state of order one, as NumPy float64 arrays."""
    rng = np.random.default_rng(seed)
    return parameters(layer) | {
        "x": rng.standard_normal((seq, layer.d_model)),
        "state": rng.standard_normal((layer.half, 2)),
    }


def read(layer, point):
    """Outputs and new state at a point, from the layer."""
    cache = eqx.tree_at(lambda c: c.state, layer.init_cache(), point["state"])
    y, cache = with_parameters(layer, point).prefill(point["x"], cache)
    return y, cache.state


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in CONFIGS), ("zoh", "float32")],
)
def test_values_and_states_are_those_of_scipy(name, dtype):
    layer, seq = make(name), 7
    with enable_x64(dtype == "float64"):
        point = point_of(layer, 1, seq)
        cast = {name: jnp.asarray(value, dtype) for name, value in point.items()}
        y, state = jax.jit(lambda point: read(layer, point))(cast)
        rounded = {name: np.asarray(value, "float64") for name, value in cast.items()}
    assert {y.dtype, state.dtype} == {jnp.dtype(dtype)}
    want, after = s5_row(layer, rounded, rounded["x"], rounded["state"])
    close = functools.partial(assert_close, dtype=dtype, length=seq * layer.d_state)
    close(y, want, name="y")
    close(state, after, name="state")


@functools.cache
def compiled_call():
    layer = make("zoh")
    return eqx.filter_jit(lambda x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_scipy(rows, seed):
    layer, ids = make("zoh"), np.asarray(rows, "int32")
    x = np.random.default_rng(seed).standard_normal((len(rows), 3)).astype("float32")
    got = np.asarray(compiled_call()(x, ids))
    for positions in documents(ids):
        p = parameters(layer)
        want, _ = s5_row(layer, p, x[positions], np.zeros((layer.half, 2)))
        assert_close(got[positions], want, dtype="float32", length=30)
    assert not np.any(got[ids < 0])


def losses(layer, seq):
    """One loss of outputs and state twice: on the layer, and on the oracle."""
    rng = np.random.default_rng(7)
    shapes = [(seq, layer.d_model), (layer.half, 2)]
    weights = [rng.standard_normal(shape) for shape in shapes]

    def loss(point):
        terms = zip(weights, read(layer, point), strict=True)
        return jnp.sum(jnp.stack([jnp.sum(w * part**2) for w, part in terms]))

    def oracle(point):
        parts = s5_row(layer, point, point["x"], point["state"])
        return sum(np.sum(w * p**2) for w, p in zip(weights, parts, strict=True))

    return loss, oracle


@pytest.mark.parametrize(
    "name", ["clipped", pytest.param("bilinear", marks=pytest.mark.slow)]
)
def test_first_derivatives_through_states(name):
    layer = make(name)
    check_first_order(*losses(layer, 4), point_of(layer, 2, 4))


@pytest.mark.parametrize("name", ["zoh", "bilinear"])
@pytest.mark.slow
def test_second_derivatives_through_states(name):
    layer = make(name)
    check_second_order(*losses(layer, 3), point_of(layer, 3, 3))
