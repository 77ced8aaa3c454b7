"""The Mamba layer's values and derivatives, against NumPy loops in float64."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support import numpy_oracles as oracles
from support.derivatives import check_first_order, check_second_order
from support.finite_differences import directional_derivative, random_direction
from support.layer_cases import packed_rows, seeds
from support.mamba_oracle import (
    Remembered,
    mamba_row,
    parameters,
    with_parameters,
)
from support.precision import enable_x64
from support.tolerances import DIFFERENCE_TOLERANCES, assert_close

from capibara_eqx.layers import Mamba


# The last ones: more tokens than a chunk of the scan, fewer than taps.
CONFIGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "default": (3, 7, {}),
    "gelu": (3, 7, {"activation": "gelu", "d_state": 5, "d_conv": 3}),
    "relu": (2, 7, {"activation": "relu", "d_state": 1, "expand": 3}),
    "biases": (2, 7, {"bias": True, "conv_bias": False, "d_state": 3, "dt_rank": 4}),
    "no_conv": (2, 7, {"d_conv": 1, "d_state": 3}),
    "long": (2, 71, {"d_state": 3}),
    "shorter_than_the_conv": (2, 2, {"d_conv": 6, "d_state": 3}),
}


def moved(layer, seed):
    """The layer with noise on every parameter: ones and zeros hide mistakes."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(noisy, layer)


@functools.cache
def make(name):
    d_model, _, options = CONFIGS[name]
    return moved(Mamba(d_model, **options, key=jax.random.key(0)), 0)


def point_of(layer, seed, seq):
    """Parameters, input and caches of order one, as NumPy float64 arrays."""
    rng = np.random.default_rng(seed)
    shape = (layer.conv.reach, layer.d_inner)
    return {
        name: value.astype("float64") for name, value in parameters(layer).items()
    } | {
        "x": rng.standard_normal((seq, layer.d_model)),
        "inputs": rng.standard_normal(shape),
        "state": rng.standard_normal((layer.d_inner, layer.d_state)),
    }


def cache_of(layer, inputs, state):
    cache = layer.init_cache()
    return eqx.tree_at(lambda c: (c.conv.inputs, c.state), cache, (inputs, state))


def read(layer, point):
    """Outputs and new cache at a point, from the layer."""
    cache = cache_of(layer, point["inputs"], point["state"])
    return with_parameters(layer, point).prefill(point["x"], cache)


def weights_of(layer, seq):
    """Weights of order one that make a loss of outputs and caches."""
    rng = np.random.default_rng(7)
    shapes = [(seq, layer.d_model), (layer.conv.reach, layer.d_inner)]
    shapes.append((layer.d_inner, layer.d_state))
    return [rng.standard_normal(shape) for shape in shapes]


def losses(layer, seq, activation):
    """One loss twice: on the layer, and on the loops."""
    weights = weights_of(layer, seq)

    def loss(point):
        y, cache = read(layer, point)
        parts = (y, cache.conv.inputs, cache.state)
        terms = [jnp.sum(w * p**2) for w, p in zip(weights, parts, strict=True)]
        return jnp.sum(jnp.stack(terms))

    def oracle(point):
        before = Remembered(point["inputs"], point["state"])
        y, after = mamba_row(point, point["x"], before, activation)
        parts = (y, *after)
        return sum(np.sum(w * p**2) for w, p in zip(weights, parts, strict=True))

    return loss, oracle


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_caches_are_those_of_the_loops(name, dtype):
    _, seq, options = CONFIGS[name]
    with enable_x64(dtype == "float64"):
        layer = make(name)
        point = point_of(layer, 1, seq)
        cast = {name: jnp.asarray(value, dtype) for name, value in point.items()}
        y, cache = jax.jit(lambda point: read(layer, point))(cast)
        assert {y.dtype, cache.state.dtype} == {jnp.dtype(dtype)}
        rounded = {name: np.asarray(value, "float64") for name, value in cast.items()}
        before = Remembered(rounded["inputs"], rounded["state"])
        activation = options.get("activation", "silu")
        want, after = mamba_row(rounded, rounded["x"], before, activation)
        terms = seq * layer.d_state + layer.d_inner
        close = functools.partial(assert_close, dtype=dtype, length=terms)
        close(y, want, name="y")
        close(cache.state, after.state, name="state")
        close(cache.conv.inputs, after.inputs, name="inputs of the convolution")


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loops(rows, seed):
    layer = make("default")
    x = np.random.default_rng(seed).standard_normal((len(rows), 3)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    want = oracles.mamba_layer(parameters(layer), x, segment_ids=ids)
    assert_close(y, want, dtype="float32", length=100)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_first_derivatives_through_caches(activation):
    layer = moved(
        Mamba(2, 3, 3, bias=True, activation=activation, key=jax.random.key(1)), 1
    )
    check_first_order(*losses(layer, 5, activation), point_of(layer, 2, 5))


def test_second_derivatives_through_caches():
    layer = moved(Mamba(1, 2, 2, key=jax.random.key(2)), 2)
    check_second_order(*losses(layer, 4, "silu"), point_of(layer, 3, 4))


def test_a_step_of_an_inner_loop_differentiates():
    layer = moved(Mamba(1, 2, 2, key=jax.random.key(3)), 3)
    loss, _ = losses(layer, 4, "silu")
    point = point_of(layer, 4, 4)
    data = {name: point.pop(name) for name in ("x", "inputs", "state")}
    rate = 0.05

    def adapted(params, stop):
        fixed = {name: jnp.asarray(value) for name, value in data.items()}
        gradient = jax.grad(lambda p: loss(p | fixed))(params)
        if stop:
            gradient = jax.lax.stop_gradient(gradient)
        fast = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
        return loss(fast | fixed)

    with enable_x64():
        arrays = {name: jnp.asarray(value) for name, value in point.items()}
        value = jax.jit(lambda params: adapted(params, False))
        gradient = jax.jit(jax.grad(adapted), static_argnums=1)
        direction = random_direction(point, list(point), np.random.default_rng(5))

        def along(stop):
            terms = gradient(arrays, stop)
            return sum(
                np.sum(np.asarray(terms[name]) * direction[name]) for name in terms
            )

        want = directional_derivative(lambda p: float(value(dict(p))), point, direction)
        allowed = DIFFERENCE_TOLERANCES[1] * want.scale
        assert want.bound <= allowed
        assert abs(along(False) - want.value) <= allowed
        assert abs(along(True) - want.value) > 1e3 * allowed, "no second-order term"
