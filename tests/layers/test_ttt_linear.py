"""TTT-Linear's values and derivatives, against NumPy loops in float64."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support.derivatives import check_first_order, check_second_order
from support.fast_weight_maml import check_maml
from support.layer_cases import packed_rows, seeds
from support.model_oracle import moved
from support.precision import enable_x64
from support.tolerances import assert_close
from support.ttt_oracle import (
    Learned,
    as_state,
    parameters,
    settings,
    ttt_packed,
    ttt_row,
    with_parameters,
)

from capibara_eqx.layers import TTTLinear
from capibara_eqx.layers._ttt import FastWeights, ttt


# Mini-batches of one token, that end inside of the row, and longer than it.
CONFIGS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "default": (6, 2, 7, {"mini_batch_size": 3, "norm_eps": 0.1}),
    "online": (3, 1, 5, {"mini_batch_size": 1, "inner_rate": 1.5}),
    "plain": (4, 1, 9, {"mini_batch_size": 4, "output_norm": False, "gate": False}),
    "one_mini_batch": (4, 2, 5, {"qk_norm": True}),
}
# Such that differences of the loops are good to many digits.
SMOOTH: dict[str, Any] = {"norm_eps": 1.0, "inner_rate": 0.5}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def make(name):
    d_model, n_heads, _, options = CONFIGS[name]
    return moved(TTTLinear(d_model, n_heads, **options, key=jax.random.key(0)), 0)


def point_of(layer, seed, seq):
    """Parameters, input and fast weights of order one, as NumPy float64 arrays."""
    rng, (heads, d) = np.random.default_rng(seed), (layer.n_heads, layer.head_dim)
    return {
        name: value.astype("float64") for name, value in parameters(layer).items()
    } | {
        "x": rng.standard_normal((seq, layer.d_model)),
        "W": 0.5 * rng.standard_normal((heads, d, d)),
        "b": 0.5 * rng.standard_normal((heads, d)),
        "dW": 0.2 * rng.standard_normal((heads, d, d)),
        "db": 0.2 * rng.standard_normal((heads, d)),
    }


def joined(weights, bias):
    """How the layer holds them: the bias as a row behind those of the inputs."""
    return jnp.concatenate([jnp.swapaxes(weights, -1, -2), bias[:, None]], axis=1)


def read(layer, point, count):
    """Outputs and new cache at a point, from the layer, `count` tokens on."""
    fast = FastWeights(
        joined(point["W"], point["b"]),
        joined(point["dW"], point["db"]),
        jnp.asarray(count, "int32"),
    )
    cache = eqx.tree_at(lambda c: c.fast, layer.init_cache(), fast)
    return with_parameters(layer, point).prefill(point["x"], cache)


def read_by_loops(layer, point, count):
    before = Learned(point["W"], point["b"], point["dW"], point["db"], count)
    y, after = ttt_row(point, point["x"], settings(layer), before)
    return y, as_state(after.W, after.b), as_state(after.dW, after.db), after.count


def losses(layer, seq, count):
    """One loss twice: on the layer, and on the loops."""
    rng, point = np.random.default_rng(7), point_of(layer, 0, seq)
    shapes = [part.shape for part in read_by_loops(layer, point, count)[:3]]
    weights = [rng.standard_normal(shape) for shape in shapes]

    def loss(point):
        y, cache = read(layer, point, count)
        parts = (y, cache.fast.weights, cache.fast.gradient)
        terms = [jnp.sum(w * p**2) for w, p in zip(weights, parts, strict=True)]
        return jnp.sum(jnp.stack(terms))

    def oracle(point):
        *parts, _ = read_by_loops(layer, point, count)
        return sum(np.sum(w * p**2) for w, p in zip(weights, parts, strict=True))

    return loss, oracle


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("default", "float64"),
        *(slow("default", "float32"), slow("online", "float64")),
        *(slow("plain", "float32"), slow("plain", "float64")),
        *(slow("one_mini_batch", "float32"), slow("one_mini_batch", "float64")),
    ],
)
def test_values_and_caches_are_those_of_the_loops(name, dtype):
    """Continued at the start of a mini-batch, and inside of one."""
    seq = CONFIGS[name][2]
    with enable_x64(dtype == "float64"):
        layer = make(name)
        cast = {n: jnp.asarray(v, dtype) for n, v in point_of(layer, 1, seq).items()}
        rounded = {n: np.asarray(v, "float64") for n, v in cast.items()}
        run = jax.jit(lambda point, count: read(layer, point, count))
        for count in {0, min(2, layer.mini_batch_size) - 1, layer.mini_batch_size - 1}:
            y, cache = run(cast, count)
            assert {y.dtype, cache.fast.weights.dtype} == {jnp.dtype(dtype)}
            got = (y, cache.fast.weights, cache.fast.gradient)
            *want, after = read_by_loops(layer, rounded, count)
            assert cache.fast.count == after
            names = ("y", "weights", "gradient")
            for part, expected, label in zip(got, want, names, strict=True):
                # A gradient of nothing yet is compared with what it is added to.
                terms = float(np.max(np.abs(want[1])))
                how = {"dtype": dtype, "length": 100, "terms": terms}
                assert_close(part, expected, **how, name=label)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_form_for_training_is_that_of_the_loops(name):
    layer = make(name)
    x = np.random.default_rng(2).standard_normal((2, 11, layer.d_model))
    y = eqx.filter_jit(lambda layer, x: layer(x))(layer, jnp.asarray(x, "float32"))
    for row, values in enumerate(x.astype("float32")):
        want = ttt_row(parameters(layer), values, settings(layer))[0]
        assert_close(y[row], want, dtype="float32", length=100)


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loops(rows, seed):
    layer = make("default")
    x = np.random.default_rng(seed).standard_normal((len(rows), 6)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    want = ttt_packed(parameters(layer), x, settings(layer), ids)
    assert_close(y, want, dtype="float32", length=100)


def inner(seed, shape=(7, 2), width=3):
    """Queries, keys, values and rates of a few tokens and heads, in float64."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, *shape, width))
    return q, k, v, rng.uniform(0.1, 0.5, shape)


def as_it_is(y):
    return y


@functools.partial(jax.jit, static_argnames="size")
def of_a_linear_model(q, k, v, rate, start, size):
    """Read-outs of $f(x) = W x$, without a schedule."""
    return ttt(q, k, v, rate, jnp.ones(size), start, as_it_is)[0]


@given(seed=seeds)
def test_one_batch_of_a_linear_model_is_linear_attention(seed):
    """Theorem 1: from zero, with the rate 1/2, and all gradients at the start."""
    with enable_x64():
        q, k, v, _ = inner(seed)
        rate, start = np.full(q.shape[:2], 0.5), np.zeros((2, 3, 3))
        y = of_a_linear_model(q, k, v, rate, start, size=7)
        want = np.zeros(q.shape)
        for t in range(len(q)):
            for s in range(t + 1):
                want[t] += np.sum(q[t] * k[s], -1, keepdims=True) * v[s]
        assert np.max(np.abs(y - want)) <= 1e-12 * max(1, np.max(np.abs(want)))


@pytest.mark.slow
def test_an_online_step_with_a_key_of_length_one_stores_its_value():
    """The delta rule: read at the key of the token before it comes back whole."""
    with enable_x64():
        _, k, v, _ = inner(3)
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        start = np.random.default_rng(4).standard_normal((2, 3, 3))
        y = of_a_linear_model(k, k, v, np.full(k.shape[:2], 0.5), start, size=1)
        assert_close(y, v, dtype="float64", length=10)


def test_the_dual_form_is_the_primal_one():
    """Weights as matrices, by `jax.grad` of the loss: no formula of a gradient."""
    size, seq = 3, 8
    with enable_x64():
        model = make("default")._inner_norm
        q, k, v, rate = inner(5, (seq, 2))
        rng = np.random.default_rng(6)
        start, schedule = rng.standard_normal((2, 3, 3)), rng.uniform(0.3, 1, size)
        run = jax.jit(functools.partial(ttt, model=model))
        y, state = run(q, k, v, rate, schedule, start)

        def loss(W, k, v):
            return jnp.sum((model(jnp.einsum("hio,hi->ho", W, k)) - v) ** 2)

        W, total, gradient = start, np.zeros_like(start), jax.jit(jax.grad(loss))
        for t in range(seq):
            total = total + rate[t][:, None, None] * gradient(W, k[t], v[t])
            W_t = W - schedule[t % size] * total
            want = np.einsum("hio,hi->ho", W_t, q[t])
            assert_close(y[t], want, dtype="float64", length=100, name=f"y at {t}")
            if t % size == size - 1:
                W, total = W_t, np.zeros_like(start)
        assert_close(state.weights, W, dtype="float64", length=100)
        assert_close(state.gradient, total, dtype="float64", length=100)


@pytest.mark.slow
def test_first_derivatives_through_caches():
    layer = TTTLinear(2, 1, mini_batch_size=2, **SMOOTH, key=jax.random.key(1))
    layer = moved(layer, 1)
    check_first_order(*losses(layer, 4, 1), point_of(layer, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 8])
def test_second_derivatives_through_caches(size):
    layer = TTTLinear(2, 1, mini_batch_size=size, **SMOOTH, key=jax.random.key(2))
    layer = moved(layer, 2)
    check_second_order(*losses(layer, 3, size // 2), point_of(layer, 3, 3))


@pytest.mark.slow
def test_maml_through_the_layer():
    options = {**SMOOTH, "gate": False}
    layer = TTTLinear(2, 1, mini_batch_size=2, **options, key=jax.random.key(3))
    layer = moved(layer, 3)
    known = settings(layer)
    check_maml(
        lambda params, x: with_parameters(layer, params)(x),
        lambda params, x: ttt_row(params, x, known)[0],
        {name: v.astype("float64") for name, v in parameters(layer).items()},
        d_model=2,
    )


@pytest.mark.slow
def test_what_is_told_over_and_over_is_learned():
    """Two pairs in three dimensions: errors go to zero."""
    with enable_x64():
        _, k, v, _ = inner(8, (2, 1))
        k, v = np.tile(k, (60, 1, 1)), np.tile(v, (60, 1, 1))
        rate, start = np.full(k.shape[:2], 0.1), np.zeros((1, 3, 3))
        error = of_a_linear_model(k, k, v, rate, start, size=2) - v
        sizes = np.sum(error**2, axis=(1, 2))
        assert np.max(sizes[-2:]) < 1e-3 * np.min(sizes[:2])
