"""The Mamba-2 layer's values and derivatives, against NumPy loops in float64."""

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
from support.mamba2_oracle import (
    mamba2_packed,
    mamba2_row,
    parameters,
    settings,
    with_parameters,
)
from support.mamba_oracle import Remembered
from support.model_oracle import moved
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.layers import GatedRMSNorm, Mamba2


# The last ones: more tokens than a chunk, fewer than taps.
CONFIGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "default": (3, 7, {"d_state": 4, "head_dim": 2}),
    "groups": (
        4,
        7,
        {"d_state": 3, "head_dim": 2, "n_groups": 2, "norm_before_gate": True},
    ),
    "limited": (
        4,
        7,
        {"d_state": 3, "head_dim": 4, "dt_limit": (0.02, 0.05), "activation": "gelu"},
    ),
    "biases": (
        2,
        7,
        {"bias": True, "conv_bias": False, "head_dim": 1, "n_groups": 2}
        | {"d_state": 1, "d_conv": 1, "norm_eps": 1e-5},
    ),
    "long": (2, 71, {"d_state": 3, "head_dim": 2, "chunk_size": 16}),
    "shorter_than_the_conv": (2, 2, {"d_conv": 6, "d_state": 3, "head_dim": 2}),
}


@functools.cache
def make(name):
    d_model, _, options = CONFIGS[name]
    return moved(Mamba2(d_model, **options, key=jax.random.key(0)), 0)


def point_of(layer, seed, seq):
    """Parameters, input and caches of order one, as NumPy float64 arrays."""
    rng = np.random.default_rng(seed)
    channels = layer.conv.in_channels
    return {
        name: value.astype("float64") for name, value in parameters(layer).items()
    } | {
        "x": rng.standard_normal((seq, layer.d_model)),
        "inputs": rng.standard_normal((layer.conv.reach, channels)),
        "state": rng.standard_normal((layer.n_heads, layer.head_dim, layer.d_state)),
    }


def read(layer, point):
    """Outputs and new cache at a point, from the layer."""
    cache = eqx.tree_at(
        lambda c: (c.conv.inputs, c.state),
        layer.init_cache(),
        (point["inputs"], point["state"]),
    )
    return with_parameters(layer, point).prefill(point["x"], cache)


def losses(layer, seq):
    """One loss twice: on the layer, and on the loops."""
    rng, point = np.random.default_rng(7), point_of(layer, 0, seq)
    weights = [rng.standard_normal(point[n].shape) for n in ("x", "inputs", "state")]

    def loss(point):
        y, cache = read(layer, point)
        parts = (y, cache.conv.inputs, cache.state)
        terms = [jnp.sum(w * p**2) for w, p in zip(weights, parts, strict=True)]
        return jnp.sum(jnp.stack(terms))

    def oracle(point):
        before = Remembered(point["inputs"], point["state"])
        y, after = mamba2_row(point, point["x"], settings(layer), before)
        parts = (y, *after)
        return sum(np.sum(w * p**2) for w, p in zip(weights, parts, strict=True))

    return loss, oracle


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_caches_are_those_of_the_loops(name, dtype):
    seq = CONFIGS[name][1]
    with enable_x64(dtype == "float64"):
        layer = make(name)
        cast = {n: jnp.asarray(v, dtype) for n, v in point_of(layer, 1, seq).items()}
        y, cache = jax.jit(lambda point: read(layer, point))(cast)
        assert {y.dtype, cache.state.dtype} == {jnp.dtype(dtype)}
        rounded = {n: np.asarray(v, "float64") for n, v in cast.items()}
        before = Remembered(rounded["inputs"], rounded["state"])
        want, after = mamba2_row(rounded, rounded["x"], settings(layer), before)
        terms = seq * layer.d_state + layer.d_inner
        close = functools.partial(assert_close, dtype=dtype, length=terms)
        close(y, want, name="y")
        close(cache.state, after.state, name="state")
        close(cache.conv.inputs, after.inputs, name="inputs of the convolution")


def test_steps_obey_the_limit_as_a_row_does():
    """Unlike in transformers and the original, where only rows are clipped."""
    layer = make("limited")
    x = np.random.default_rng(3).standard_normal((5, 4)).astype("float32")
    want, after = mamba2_row(parameters(layer), x, settings(layer))
    cache, step = layer.init_cache(), jax.jit(lambda x, cache: layer.step(x, cache))
    for t in range(5):
        y, cache = step(jnp.asarray(x[t]), cache)
        assert_close(y, want[t], dtype="float32", length=50, name=f"y at {t}")
    assert_close(cache.state, after.state, dtype="float32", length=50)
    free = settings(layer)._replace(dt_limit=(0.0, np.inf))
    assert np.max(np.abs(mamba2_row(parameters(layer), x, free)[0] - want)) > 1e-3


def test_one_token_is_the_recurrence_and_no_chunk():
    layer = Mamba2(8, 4, head_dim=4, chunk_size=64, key=jax.random.key(0))
    program = jax.make_jaxpr(layer.step)(jnp.zeros(8), layer.init_cache())
    shapes = [v.aval.shape for e in program.eqns for v in e.outvars]
    assert all(64 not in shape for shape in shapes)
    assert "while" not in str(program)
    assert "scan" not in str(program)


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loops(rows, seed):
    layer = make("limited")
    x = np.random.default_rng(seed).standard_normal((len(rows), 4)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    want = mamba2_packed(parameters(layer), x, settings(layer), ids)
    assert_close(y, want, dtype="float32", length=100)


def test_first_derivatives_through_caches():
    layer = moved(
        Mamba2(2, 2, 3, head_dim=2, bias=True, chunk_size=3, key=jax.random.key(1)), 1
    )
    check_first_order(*losses(layer, 5), point_of(layer, 2, 5))


@pytest.mark.slow
def test_second_derivatives_through_caches():
    options = {"head_dim": 1, "chunk_size": 3, "norm_eps": 0.5}
    layer = moved(Mamba2(1, 2, 2, **options, key=jax.random.key(2)), 2)
    check_second_order(*losses(layer, 4), point_of(layer, 3, 4))


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_gated_norm_by_hand(norm_before_gate):
    norm = moved(GatedRMSNorm(6, 3, norm_before_gate, eps=1e-2), 4)
    rng = np.random.default_rng(5)
    x, z = rng.standard_normal((2, 4, 6)).astype("float32")
    gate = z / (1 + np.exp(-z.astype("float64")))
    y = x if norm_before_gate else x * gate
    for start in (0, 2, 4):
        part = y[:, start : start + 2]
        size = np.sqrt(np.mean(part**2, axis=-1, keepdims=True) + 1e-2)
        want = part / size * np.asarray(norm.weight)[start : start + 2]
        if norm_before_gate:
            want = want * gate[:, start : start + 2]
        got = norm(jnp.asarray(x), jnp.asarray(z))[:, start : start + 2]
        assert_close(got, want, dtype="float32", length=4)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_may_have_no_rows(packed):
    layer, x = make("groups"), jnp.zeros((2, 0, 7, 4))
    ids = jnp.zeros(x.shape[:-1], "int32") if packed else None
    cache = layer.init_cache(x.shape[:-2])
    y, after = eqx.filter_jit(layer.prefill)(x, cache, segment_ids=ids)
    assert y.shape == x.shape
    assert eqx.tree_equal(after, cache)
