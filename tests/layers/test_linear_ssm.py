"""LinearSSM's values and derivatives, against SciPy and NumPy in float64."""

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
from support.linear_ssm_oracle import (
    Remembered,
    discretized,
    linear_ssm_row,
    parameters,
    with_parameters,
)
from support.numpy_oracles import documents
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import LinearSSM, hippo_matrices, ssm_step


CONFIGS: dict[str, dict[str, Any]] = {
    "zoh": {"input_dim": 3, "output_dim": 2, "state_dim": 4, "conv_dim": 3},
    "bilinear": {
        "input_dim": 2,
        "output_dim": 2,
        "state_dim": 3,
        "conv_dim": 1,
        "measure": "legt",
        "discretization": "bilinear",
    },
    "no_residual": {
        "input_dim": 1,
        "output_dim": 3,
        "state_dim": 1,
        "conv_dim": 9,
        "discretization": "bilinear",
        "residual": False,
    },
}


@functools.cache
def make(name):
    """A layer whose numbers are of this size but for HiPPO's A; steps of about 0.1."""
    layer = filled(LinearSSM, **CONFIGS[name], dropout_rate=0.0, seed=0, size=0.5)
    measure = CONFIGS[name].get("measure", "legs")
    A = hippo_matrices(layer.state_dim, measure).A + 0.1 * layer.A
    return eqx.tree_at(lambda m: (m.A, m.log_dt), layer, (A, layer.log_dt - 2))


def point_of(layer, seed, seq):
    """Parameters, input and caches of order one, as NumPy float64 arrays."""
    rng = np.random.default_rng(seed)
    return parameters(layer) | {
        "x": rng.standard_normal((seq, layer.input_dim)),
        "inputs": rng.standard_normal((layer.conv.reach, layer.input_dim)),
        "state": rng.standard_normal(layer.state_dim),
    }


def read(layer, point):
    """Outputs and new cache at a point, from the layer."""
    cache = eqx.tree_at(
        lambda c: (c.conv.inputs, c.state),
        layer.init_cache(),
        (point["inputs"], point["state"]),
    )
    return with_parameters(layer, point).prefill(point["x"], cache)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in CONFIGS), ("zoh", "float32")],
)
def test_values_and_caches_are_those_of_scipy(name, dtype):
    layer, seq = make(name), 7
    point = point_of(layer, 1, seq)
    with enable_x64(dtype == "float64"):
        cast = {name: jnp.asarray(value, dtype) for name, value in point.items()}
        y, cache = jax.jit(lambda point: read(layer, point))(cast)
        rounded = {name: np.asarray(value, "float64") for name, value in cast.items()}
    assert {y.dtype, cache.state.dtype} == {jnp.dtype(dtype)}
    before = Remembered(rounded["inputs"], rounded["state"])
    want, after = linear_ssm_row(layer, rounded, rounded["x"], before)
    close = functools.partial(assert_close, dtype=dtype, length=seq * layer.state_dim)
    close(y, want, name="y")
    close(cache.state, after.state, name="state")
    close(cache.conv.inputs, after.inputs, name="inputs of the convolution")


@functools.cache
def compiled(name):
    """The functions of a layer that several tests call."""
    layer = make(name)
    return {
        "call": eqx.filter_jit(lambda x, ids=None: layer(x, segment_ids=ids)),
        "forward": eqx.filter_jit(lambda x, state=None: layer.forward(x, state)),
    }


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_scipy(rows, seed):
    layer, ids = make("bilinear"), np.asarray(rows, "int32")
    x = np.random.default_rng(seed).standard_normal((len(rows), 2)).astype("float32")
    got = np.asarray(compiled("bilinear")["call"](x, ids))
    fresh = Remembered(np.zeros((0, 2)), np.zeros(3))
    for positions in documents(ids):
        want, _ = linear_ssm_row(layer, parameters(layer), x[positions], fresh)
        assert_close(got[positions], want, dtype="float32", length=30)
    assert not np.any(got[ids < 0])


def test_the_core_is_a_convolution_with_powers_of_a_matrix():
    """y = sum_k C A^k B u_(t-k), the convolution being one tap: u = silu(w x + b)."""
    layer, seq = make("bilinear"), 9
    x = np.random.default_rng(2).standard_normal((seq, 2))
    p = parameters(layer)
    v = x * p["conv.weight"][:, 0, 0] + p["conv.bias"]
    u = v / (1 + np.exp(-v))
    A, B = discretized(p["A"], p["B"], float(np.exp(p["log_dt"])), "bilinear")
    taps = [p["C"] @ np.linalg.matrix_power(A, k) @ B for k in range(seq)]
    want = x + u @ p["D"].T
    for t in range(seq):
        want[t] += sum(taps[k] @ u[t - k] for k in range(t + 1))
    got = compiled("bilinear")["call"](x.astype("float32"))
    assert_close(got, want, dtype="float32", length=30)


def test_the_core_is_a_scan_of_steps():
    layer = make("zoh")
    x = np.random.default_rng(3).standard_normal((2, 6, 3)).astype("float32")

    @eqx.filter_jit
    def by_steps(layer, x):
        A, B = layer.discretized()
        u = layer.conv(x)
        carry = (jnp.zeros((2, 4)), jnp.zeros((2, 2)))
        (h, y_last), y = jax.lax.scan(
            lambda carry, u_t: ssm_step(carry, u_t, A, B, layer.C),
            carry,
            jnp.moveaxis(u, 1, 0),
        )
        y = jnp.moveaxis(y, 0, 1)
        return y + u @ layer.D.T + layer.residual_proj(x), h, y[:, -1] - y_last

    got, h, difference = by_steps(layer, x)
    want, cache = compiled("zoh")["forward"](x)
    assert_close(got, want, dtype="float32", length=30)
    assert_close(h, cache.state, dtype="float32", length=30)
    assert not np.any(difference)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_the_state_does_not_grow_at_the_start(measure, discretization):
    @jax.jit
    def decay(log_dt):
        build = functools.partial(LinearSSM, 1, 1, 32, measure=measure)
        layer = build(discretization=discretization, key=jax.random.key(0))
        layer = eqx.tree_at(lambda m: m.log_dt, layer, log_dt)
        return layer.discretized()[0]

    for dt in (0.001, 0.1):
        A_bar = np.asarray(decay(jnp.log(jnp.float32(dt))), "float64")
        assert np.abs(np.linalg.eigvals(A_bar)).max() < 1
        if measure == "legs":
            # A + A^T is negative definite: not even for a while.
            assert np.linalg.norm(A_bar, 2) < 1


def test_a_sequence_in_parts_is_the_sequence():
    forward = compiled("bilinear")["forward"]
    x = np.random.default_rng(4).standard_normal((2, 7, 2)).astype("float32")
    h = np.random.default_rng(5).standard_normal((2, 3)).astype("float32")
    whole, want = forward(x, h)
    first, cache = forward(x[:, :4], h)
    second, cache = forward(x[:, 4:6], cache)
    last, cache = forward(x[:, 6], cache)
    parts = np.concatenate([first, second, last[:, None]], axis=1)
    assert_close(parts, whole, dtype="float32", length=20)
    assert_close(cache.state, want.state, dtype="float32", length=20)
    # Without a state it starts from zeros, as the call does.
    fresh, _ = forward(x)
    assert_close(fresh, compiled("bilinear")["call"](x), dtype="float32", length=20)
    assert np.abs(fresh - whole).max() > 1e-2


def losses(layer, seq):
    """One loss of outputs and caches twice: on the layer, and on the oracle."""
    rng = np.random.default_rng(7)
    shapes = [
        (seq, layer.output_dim),
        (layer.conv.reach, layer.input_dim),
        (layer.state_dim,),
    ]
    weights = [rng.standard_normal(shape) for shape in shapes]

    def loss(point):
        y, cache = read(layer, point)
        parts = (y, cache.conv.inputs, cache.state)
        terms = [jnp.sum(w * p**2) for w, p in zip(weights, parts, strict=True)]
        return jnp.sum(jnp.stack(terms))

    def oracle(point):
        before = Remembered(point["inputs"], point["state"])
        y, after = linear_ssm_row(layer, point, point["x"], before)
        parts = (y, *after)
        return sum(np.sum(w * p**2) for w, p in zip(weights, parts, strict=True))

    return loss, oracle


def test_first_derivatives_through_caches():
    layer = make("zoh")
    check_first_order(*losses(layer, 4), point_of(layer, 2, 4))


@pytest.mark.parametrize(
    "name", ["bilinear", pytest.param("zoh", marks=pytest.mark.slow)]
)
def test_second_derivatives_through_caches(name):
    layer = make(name)
    check_second_order(*losses(layer, 3), point_of(layer, 3, 3))
