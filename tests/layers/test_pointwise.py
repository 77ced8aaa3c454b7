"""Layers that look at one token at a time, against NumPy in float64."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support import numpy_oracles as oracles
from support.layer_cases import seeds
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm


BFLOAT16 = jnp.dtype("bfloat16")
shapes = st.sampled_from([(), (1,), (5,), (2, 3)])


@functools.cache
def compiled():
    return eqx.filter_jit(lambda layer, x: layer(x))


def random(shape, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal(shape)).astype("float32")


@given(shape=shapes, use_bias=st.booleans(), seed=seeds)
def test_linear(shape, use_bias, seed):
    layer = Linear(7, 3, use_bias, key=jax.random.key(seed))
    x = random((*shape, 7), seed)
    want = oracles.wide(x) @ oracles.wide(layer.weight).T
    if layer.bias is not None:
        want = want + oracles.wide(layer.bias)
    assert (layer.bias is not None) == use_bias
    assert_close(compiled()(layer, x), want, dtype="float32", length=7)


def test_linear_starts_uniform():
    layer = Linear(9, 300, key=jax.random.key(0))
    for values in (layer.weight, layer.bias):
        values = np.asarray(values, "float64").ravel()
        assert np.all(np.abs(values) <= 1 / 3)
        assert stats.kstest(values, "uniform", (-1 / 3, 2 / 3)).pvalue > 1e-3


def test_linear_stands_in_for_equinox():
    ours = Linear(4, 3, key=jax.random.key(0))
    theirs = eqx.nn.Linear(4, 3, key=jax.random.key(1))
    theirs = eqx.tree_at(lambda m: (m.weight, m.bias), theirs, (ours.weight, ours.bias))
    x = random((4,), 0)
    assert_close(ours(jnp.asarray(x)), theirs(jnp.asarray(x)), dtype="float32")


@given(
    shape=shapes,
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 3.0]),
    seed=seeds,
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind, shape, scale, offset, seed):
    x = random((*shape, 6), seed, scale) + np.float32(offset * scale)
    weight, bias = random((6,), seed + 1), random((6,), seed + 2)
    if kind == "rms":
        layer = eqx.tree_at(lambda m: m.weight, RMSNorm(6), jnp.asarray(weight))
        want = oracles.rms_norm(x, weight)
    else:
        layer = eqx.tree_at(
            lambda m: (m.weight, m.bias),
            LayerNorm(6),
            (jnp.asarray(weight), jnp.asarray(bias)),
        )
        want = oracles.layer_norm(x, weight, bias)
    assert_close(compiled()(layer, x), want, dtype="float32", length=6)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_options_of_the_norms(eps):
    x = random((4, 5), 0)
    close = functools.partial(assert_close, dtype="float32", length=5)
    array = jnp.asarray(x)
    close(RMSNorm(5, eps)(array), oracles.rms_norm(x, eps=eps))
    close(RMSNorm(5, eps, use_weight=False)(array), oracles.rms_norm(x, eps=eps))
    close(LayerNorm(5, eps)(array), oracles.layer_norm(x, eps=eps))
    bare = LayerNorm(5, eps, use_weight=False, use_bias=False)
    close(bare(array), oracles.layer_norm(x, eps=eps))
    assert jax.tree.leaves((bare, RMSNorm(5, use_weight=False))) == []
    for layer in (RMSNorm(5, dtype=jnp.bfloat16), LayerNorm(5, dtype=jnp.bfloat16)):
        assert {leaf.dtype for leaf in jax.tree.leaves(layer)} == {BFLOAT16}


@pytest.mark.parametrize("layer", [RMSNorm(400), LayerNorm(400)], ids=["rms", "layer"])
def test_norms_compute_wide(layer):
    x = jnp.asarray(random((3, 400), 0) + 2.0, "bfloat16")
    exact = oracles.rms_norm if isinstance(layer, RMSNorm) else oracles.layer_norm
    got = layer(x)
    assert got.dtype == jnp.bfloat16
    assert_rounded(got, exact(np.asarray(x, "float32")), length=400)


def test_embedding_takes_rows():
    layer = Embedding(11, 3, key=jax.random.key(0))
    tokens = np.asarray([[0, 10, 4], [4, 4, 1]], "int32")
    want = np.asarray(layer.weight)[tokens]
    np.testing.assert_array_equal(layer(jnp.asarray(tokens)), want)
    np.testing.assert_array_equal(layer(jnp.asarray(10, "int32")), layer.weight[10])


@pytest.mark.parametrize("token", [11, 2**31 - 1, -1, -11, -12])
def test_an_id_outside_the_table_gives_nan(token):
    layer = Embedding(11, 3, key=jax.random.key(0))
    got = layer(jnp.asarray([token, 2], "int32"))
    assert np.all(np.isnan(got[0]))
    np.testing.assert_array_equal(got[1], layer.weight[2])


def test_embedding_scores_and_initial_values():
    layer = Embedding(300, 40, key=jax.random.key(0))
    x = random((2, 40), 0)
    want = oracles.wide(x) @ oracles.wide(layer.weight).T
    assert_close(layer.attend(jnp.asarray(x)), want, dtype="float32", length=40)
    values = np.asarray(layer.weight, "float64").ravel()
    assert stats.kstest(values / 0.02, "norm").pvalue > 1e-3
    narrow = Embedding(3, 2, dtype=jnp.bfloat16, key=jax.random.key(0))
    assert narrow(jnp.asarray([0])).dtype == jnp.bfloat16


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_scales_it(p):
    layer = Dropout(p)
    x = jnp.full((40_000,), 3.0)
    y = np.asarray(layer(x, key=jax.random.key(0)))
    kept = y != 0
    assert stats.binomtest(int(kept.sum()), y.size, 1 - p).pvalue > 1e-3
    np.testing.assert_allclose(y[kept], 3.0 / (1 - p), rtol=2e-7)
    other = np.asarray(layer(x, key=jax.random.key(1)))
    assert np.any(other != y)
    np.testing.assert_array_equal(layer(x, key=jax.random.key(0)), y)


def test_dropout_treats_every_element_on_its_own():
    y = np.asarray(Dropout(0.5)(jnp.ones((200, 200)), key=jax.random.key(0))) != 0
    # Neighbours along either axis agree half of the time.
    for agree in (y[1:] == y[:-1], y[:, 1:] == y[:, :-1]):
        assert stats.binomtest(int(agree.sum()), agree.size, 0.5).pvalue > 1e-3


def test_dropout_at_its_ends_and_turned_off():
    x, key = jnp.asarray(random((30,), 0)), jax.random.key(0)
    np.testing.assert_array_equal(Dropout(0.0)(x), x)
    np.testing.assert_array_equal(Dropout(1.0)(x, key=key), np.zeros(30))
    np.testing.assert_array_equal(Dropout(0.5, inference=True)(x), x)
    off = eqx.nn.inference_mode(Dropout(0.5))
    np.testing.assert_array_equal(off(x, key=key), x)
    gradient = jax.grad(lambda x: jnp.sum(Dropout(1.0)(x, key=key) ** 2))(x)
    np.testing.assert_array_equal(gradient, np.zeros(30))


def test_dropout_rate_can_be_traced():
    def apply(p):
        layer = eqx.tree_at(lambda m: m.p, Dropout(0.5), p)
        return layer(jnp.ones((1000,)), key=jax.random.key(0))

    got = jax.jit(apply)(jnp.asarray(0.25))
    np.testing.assert_allclose(
        got, Dropout(0.25)(jnp.ones((1000,)), key=jax.random.key(0)), rtol=2e-7
    )
    assert math.isclose(float(jnp.mean(got)), 1.0, abs_tol=0.1)
    np.testing.assert_array_equal(jax.jit(apply)(jnp.asarray(1.0)), np.zeros(1000))
