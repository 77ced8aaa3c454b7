"""The residual block that computes in a narrow dtype, in chunks, and twice."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support import numpy_oracles as oracles
from support.derivatives import check_first_order
from support.layer_cases import seeds
from support.mamba_oracle import mamba_row, parameters
from support.numpy_oracles import silu, wide
from support.quick import filled
from support.small_layers import ultra
from support.tolerances import assert_close

from capibara_eqx.layers import (
    Attention,
    Mamba,
    UltraSSM,
)
from capibara_eqx.models import LanguageModel, ResidualBlock, model_cost


KEY = jax.random.key(0)
WHOLE: dict[str, Any] = {"remat": False, "chunk_size": None}


@functools.cache
def layer_of(inside="mamba", **options):
    return filled(ultra, inside, seed=0, size=0.5, **options)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@eqx.filter_jit
def call(layer, x, ids=None, key=None):
    return layer(x, segment_ids=ids, key=key)


@eqx.filter_jit
def prefill(layer, x, cache, ids=None):
    return layer.prefill(x, cache, segment_ids=ids)


def feed_forward_by_loops(layer, x):
    gate, up, down = (
        wide(part.weight) for part in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def by_loops(layer, x):
    """One document, in float64."""
    x = wide(x)
    norm = layer.mixer_norm
    seen = oracles.rms_norm(x, norm.weight, norm.eps)
    x = x + mamba_row(parameters(layer.mixer), seen)[0]
    if layer.feed_forward is None:
        return x
    norm = layer.feed_forward_norm
    seen = oracles.rms_norm(x, norm.weight, norm.eps)
    return x + feed_forward_by_loops(layer.feed_forward, seen)


@pytest.mark.parametrize("d_ff", [None, 4])
def test_it_is_the_sum_of_its_parts(d_ff):
    layer, x = layer_of(d_ff=d_ff, **WHOLE), random((7, 3))
    assert_close(call(layer, x), by_loops(layer, x), dtype="float32", length=60)


def test_other_values_of_the_same_shape_give_other_outputs():
    layer = layer_of(**WHOLE)
    first, second = random((7, 3), 1), random((7, 3), 2)
    y = call(layer, first), call(layer, second)
    assert np.all(np.abs(y[0] - y[1]) > 1e-4)
    np.testing.assert_array_equal(call(layer, first), y[0])


# Around 1000 the spacing of bfloat16 is 4.
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_in_bfloat16_only_what_is_added_is_rounded(offset):
    x = random((7, 3), 3) + offset
    exact = layer_of(**WHOLE)
    y = call(layer_of(compute_dtype="bfloat16", **WHOLE), x)
    assert y.dtype == jnp.float32
    assert np.any(y != call(exact, x))
    got, want = wide(y) - wide(x), by_loops(exact, x) - wide(x)
    assert_close(got, want, dtype="bfloat16", length=16, factor=2.0)


def test_what_is_narrow_and_what_is_wide():
    seen = []

    class Watched(Mamba):
        def __init__(self, key):
            super().__init__(3, 2, key=key)

        def __call__(self, x, **options):
            seen.append((x.dtype, self.in_proj.weight.dtype, self.A_log.dtype))
            return super().__call__(x, **options)

    def build(*, key):
        return UltraSSM(Watched(key), 3, key=key)

    layer = filled(build, seed=0, size=0.5)
    assert layer.compute_dtype == "bfloat16"
    x = jax.ShapeDtypeStruct((7, 3), "float32")
    y = eqx.filter_eval_shape(call, layer, x)
    assert (y.shape, y.dtype) == ((7, 3), x.dtype)
    assert seen == [(jnp.bfloat16, jnp.bfloat16, jnp.float32)]
    y, cache = eqx.filter_eval_shape(layer.prefill, x, layer.init_cache())
    assert y.dtype == x.dtype
    assert {leaf.dtype.name for leaf in (cache.state, cache.conv.inputs)} == {"float32"}
    gradient = eqx.filter_eval_shape(
        eqx.filter_grad(lambda m, x: jnp.sum(m(x))), layer, x
    )
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(gradient)}
    assert dtypes == {"float32"}


def test_keys_and_values_are_cached_as_they_are_computed():
    attention = filled(Attention, 4, 2, seed=0, size=0.5)
    layer = UltraSSM(attention, 4, chunk_size=2, key=KEY)
    cache = layer.init_cache(max_len=5)
    assert cache.key.dtype == jnp.bfloat16
    x = random((5, 4), 4)
    y, after = prefill(layer, x, cache)
    assert after.key.dtype == jnp.bfloat16
    # The call makes its own cache, of the length of the row.
    np.testing.assert_array_equal(y, call(layer, x))


LENGTH = 7
# A document across every border, padding at one, a border at the end.
PACKED = jnp.asarray([3, 3, 3, 5, -1, 5, -1], "int32")


@eqx.filter_jit
def everything(layer, x, ids):
    """Outputs, cache, and gradients in the parameters and the input."""

    def loss(both, cache):
        layer, x = both
        y = layer(x, segment_ids=ids)
        read, after = layer.prefill(x, cache, segment_ids=ids)
        return jnp.sum(jnp.sin(y)), (y, read, after)

    differentiate = eqx.filter_grad(loss, has_aux=True)
    return differentiate((layer, x), layer.init_cache(x.shape[:-2]))


@pytest.mark.parametrize(
    ("chunk_size", "remat", "ids"),
    [
        (2, True, PACKED),
        (LENGTH - 1, False, None),
        pytest.param(5, True, PACKED, marks=pytest.mark.slow),
        pytest.param(1, False, PACKED, marks=pytest.mark.slow),
        pytest.param(2, True, None, marks=pytest.mark.slow),
    ],
)
def test_chunks_are_the_whole(chunk_size, remat, ids):
    x = random((LENGTH, 3), 5)
    whole = everything(layer_of("conv", **WHOLE), x, ids)
    layer = layer_of("conv", remat=remat, chunk_size=chunk_size)
    parts = everything(layer, x, ids)
    pairs = zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True)
    for got, want in pairs:
        assert_close(got, want, dtype="float32", length=60)


@given(seed=seeds)
def test_a_batch_of_packed_rows_in_chunks_of_mamba(seed):
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(np.repeat(rng.integers(-1, 3, (2, 2, 4)), 2, -1)[..., :7])
    x = random((2, 2, LENGTH, 3), seed)
    got = call(layer_of(chunk_size=3), x, ids.astype("int32"))
    want = call(layer_of(**WHOLE), x, ids.astype("int32"))
    assert_close(got, want, dtype="float32", length=60)


def test_derivatives_through_chunks():
    layer = layer_of("conv", chunk_size=2)
    fields = {
        "conv": lambda m: m.mixer.weight,
        "bias": lambda m: m.mixer.bias,
        "norm": lambda m: m.mixer_norm.weight,
        "up": lambda m: m.feed_forward.up_proj.weight,
    }
    point = {name: np.asarray(at(layer), "float64") for name, at in fields.items()}
    point["x"] = np.random.default_rng(6).standard_normal((5, 3))
    weights = np.random.default_rng(7).standard_normal((5, 3))
    kept = [layer.feed_forward_norm, layer.feed_forward]

    def loss(arrays):
        moved = eqx.tree_at(
            lambda m: [at(m) for at in fields.values()],
            layer,
            [arrays[name] for name in fields],
        )
        return jnp.sum(weights * moved(arrays["x"]) ** 2)

    def oracle(point):
        norm, ff = kept
        seen = oracles.rms_norm(point["x"], point["norm"])
        y, _ = oracles.causal_conv(
            seen, point["conv"], point["bias"], activation="silu", groups=3
        )
        h = point["x"] + y
        seen = oracles.rms_norm(h, norm.weight)
        hidden = silu(seen @ wide(ff.gate_proj.weight).T) * (seen @ point["up"].T)
        y = h + hidden @ wide(ff.down_proj.weight).T
        return float(np.sum(weights * y**2))

    check_first_order(loss, oracle, point)


def peak(layer, x):
    """Bytes of temporaries of a gradient in the parameters."""
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def loss(arrays, x):
        return jnp.sum(jnp.sin(eqx.combine(arrays, static)(x)))

    compiled = jax.jit(jax.grad(loss)).lower(arrays, x).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def test_chunks_and_recomputation_bound_the_memory_of_a_gradient():
    x = jax.ShapeDtypeStruct((1024, 3), "float32")
    options: dict[str, Any] = {"implementation": "xla"}

    def bytes_of(**how):
        def build(*, key):
            mixer = Mamba(3, 4, d_conv=2, **options, key=key)
            return UltraSSM(mixer, 3, 16, compute_dtype=None, **how, key=key)

        return peak(filled(build, seed=0, size=0.5), x)

    whole, both = bytes_of(), bytes_of(remat=True, chunk_size=64)
    assert 4 * both < whole, (both, whole)


def added(layer, x, key):
    return np.asarray(call(layer, x, None, key) - x)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dropout_drops_what_is_added(chunk_size):
    options = {"d_ff": None, "chunk_size": chunk_size}
    x, key = random((LENGTH, 3), 8), jax.random.key(1)
    layer = layer_of("conv", dropout_rate=0.5, **options)
    y, whole = added(layer, x, key), added(layer_of("conv", **options), x, None)
    dropped = y == 0
    assert 0 < np.mean(dropped) < 1
    assert_close(y[~dropped], 2 * whole[~dropped], dtype="float32", length=20)
    np.testing.assert_array_equal(added(layer, x, key), y)
    other = added(layer, x, jax.random.key(2)) == 0
    assert np.any(dropped != other)
    # Every chunk draws for itself.
    assert np.any(dropped[:2] != dropped[2:4])
    nothing = layer_of("conv", dropout_rate=1.0, **options)
    np.testing.assert_array_equal(call(nothing, x, None, key), x)


def test_both_outputs_are_dropped_and_not_alike():
    x, key = random((LENGTH, 3), 9), jax.random.key(1)
    nothing = layer_of("conv", dropout_rate=1.0, **WHOLE)
    np.testing.assert_array_equal(call(nothing, x, None, key), x)
    half = layer_of("conv", dropout_rate=0.5, **WHOLE)
    unmoved = added(half, x, key) == 0
    alone = added(layer_of("conv", dropout_rate=0.5, d_ff=None, **WHOLE), x, key) == 0
    assert np.all(alone[unmoved])
    assert np.sum(unmoved) < np.sum(alone)


def test_reading_into_a_cache_drops_nothing():
    x = random((LENGTH, 3), 10)
    layer, plain = layer_of("conv", dropout_rate=0.5), layer_of("conv")
    want, _ = prefill(plain, x, plain.init_cache())
    got, _ = prefill(layer, x, layer.init_cache())
    np.testing.assert_array_equal(got, want)
    got, _ = eqx.filter_jit(layer.step)(x[0], layer.init_cache())
    assert_close(got, want[0], dtype="float32", length=20)
    still = call(eqx.nn.inference_mode(layer), x)
    assert_close(still, want, dtype="float32", length=20)


def test_the_mixer_has_a_key_of_its_own():
    def build(*, key):
        mixer = Attention(3, 1, dropout_p=0.5, key=key)
        return UltraSSM(mixer, 3, compute_dtype=None, key=key)

    layer, x = filled(build, seed=0, size=0.5), random((LENGTH, 3), 11)
    y = [added(layer, x, jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(y[0], y[1])
    assert np.any(y[0] != y[2])


def test_cost_is_that_of_the_parts():
    def flops(mixer, block=True):
        blocks = [ResidualBlock(mixer, 3)]
        model = filled(LanguageModel, 3, 3, blocks, seed=0, size=1.0)
        return model_cost(model)[1].flops

    layer, norm = layer_of(), 4 * 3
    alone = layer_of(d_ff=None)
    assert flops(alone) == flops(layer.mixer) + norm
    assert flops(layer) == flops(alone) + norm + 3 * 2 * 3 * 4
