"""Attention layers against NumPy loops, and the identities between them."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_oracle import attention_row, decoupled_row
from support.derivatives import check_first_order, check_second_order
from support.kernel_cases import smooth_loss
from support.model_oracle import moved
from support.tolerances import assert_close

from capibara_eqx.layers import (
    Attention,
    AttentionMode,
    DecoupledAttention,
    KVCache,
    rotary,
)


seeds = st.integers(0, 2**32 - 1)
KEY = jax.random.key(0)
GQA = {"n_kv_heads": 2, "head_dim": 6, "rope_enabled": True, "qk_norm": True}
LAYERS = {
    "plain": (Attention(5, 5, key=KEY), attention_row),
    "everything": (
        Attention(8, 4, **GQA, rope_base=50.0, use_bias=True, window=3, key=KEY),
        attention_row,
    ),
    "both_ways": (Attention(6, 2, is_causal=False, window=2, key=KEY), attention_row),
    "decoupled": (DecoupledAttention(8, 2, None, 4, 8, key=KEY), decoupled_row),
    "decoupled_everything": (
        DecoupledAttention(
            8,
            4,
            2,
            4,
            8,
            12,
            decoupled_gate=True,
            use_bias=True,
            rope_base=30.0,
            window=4,
            key=KEY,
        ),
        decoupled_row,
    ),
}
# Run on a handful of numbers: with little optimisation they compile in half the time.
jit: Any = eqx.filter_jit
quick = functools.partial(jit, compiler_options={"xla_backend_optimization_level": 0})
call = quick(lambda layer, x: layer(x))
step = quick(lambda layer, x, cache: layer.step(x, cache))
prefill = quick(
    lambda layer, x, cache, ids=None: layer.prefill(x, cache, segment_ids=ids)
)


def layer_of(name, seed=1):
    layer, oracle = LAYERS[name]
    return moved(layer, seed), oracle


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=5)
@given(seed=seeds)
def test_equals_the_loop(name, seed):
    layer, oracle = layer_of(name, seed)
    x = normal((2, 7, layer.d_model), seed)
    got = call(layer, x)
    for row in range(2):
        assert_close(got[row], oracle(layer, x[row]), dtype="float32", length=80)


def of_parameters(layer, oracle, x):
    """The loss as a function of the arrays of the layer and of the input."""
    arrays, static = eqx.partition(layer, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    point = {f"leaf{i}": np.asarray(leaf, "float64") for i, leaf in enumerate(leaves)}
    point["x"] = np.asarray(x, "float64")

    def build(values):
        leaves = [values[f"leaf{i}"] for i in range(len(values) - 1)]
        return eqx.combine(jax.tree.unflatten(structure, leaves), static)

    def function(values):
        return smooth_loss(jnp, [build(values)(values["x"])])

    def of_numpy(values):
        return float(smooth_loss(np, [oracle(build(values), values["x"])]))

    return function, of_numpy, point


@pytest.mark.parametrize("name", ["everything", "decoupled_everything"])
def test_first_derivatives(name):
    layer, oracle = layer_of(name)
    check_first_order(*of_parameters(layer, oracle, normal((5, layer.d_model), 3)))


def test_second_derivatives():
    layer, oracle = layer_of("decoupled")
    check_second_order(*of_parameters(layer, oracle, normal((4, 8), 4)))


def test_modes_have_names():
    modes = {name: layer.mode for name, (layer, _) in LAYERS.items()}
    assert modes["plain"] is AttentionMode.STANDARD
    assert modes["everything"] is AttentionMode("gqa")
    assert modes["decoupled"] == "decoupled"
    assert Attention(4, 2, 2, key=KEY).mode is AttentionMode.STANDARD


@given(n_kv_heads=st.sampled_from([1, 2, 4]), seed=seeds)
@settings(max_examples=9)
def test_shared_keys_are_copies_in_every_head(n_kv_heads, seed):
    """Grouped-query attention is multi-head attention with equal keys in a group."""
    layer = moved(Attention(8, 4, n_kv_heads, 2, True, key=KEY), seed)
    full = Attention(8, 4, None, 2, True, key=KEY)

    def copied(weight):
        heads = weight.reshape(n_kv_heads, 2, 8)
        return jnp.repeat(heads, 4 // n_kv_heads, axis=0).reshape(8, 8)

    where = lambda m: (m.q_proj, m.k_proj.weight, m.v_proj.weight, m.o_proj)
    tied = (copied(layer.k_proj.weight), copied(layer.v_proj.weight))
    full = eqx.tree_at(where, full, (layer.q_proj, *tied, layer.o_proj))
    x = normal((6, 8), seed)
    assert_close(call(layer, x), call(full, x), dtype="float32", length=20)


@given(window=st.integers(1, 7), at=st.integers(0, 8), seed=seeds)
@settings(max_examples=12)
def test_a_token_reaches_as_far_as_the_window(window, at, seed):
    layer = moved(Attention(4, 2, rope_enabled=True, window=window, key=KEY), seed)
    x = normal((9, 4), seed)
    before, after = call(layer, x), call(layer, x.at[at].add(1.0))
    changed = np.any(np.abs(np.asarray(after - before)) > 1e-6, axis=-1)
    reached = np.arange(9)
    reached = (reached >= at) & (reached < at + window)
    np.testing.assert_array_equal(changed, reached)


def test_decoupled_is_one_attention_of_concatenated_heads():
    layer = moved(DecoupledAttention(8, 2, None, 4, 8, decoupled_gate=True, key=KEY), 3)
    x, at = normal((2, 6, 8), 5), jnp.tile(jnp.arange(6), (2, 1))
    heads = lambda m: m(x).reshape(2, 6, 2, -1)
    g = jax.nn.sigmoid(layer.gate)[None, None, :, None]
    q_geo, k_geo = (rotary(heads(m), at) for m in (layer.q_geo, layer.k_geo))
    q_sem = heads(layer.q_sem) * (2 * g / 2**0.5)
    q = jnp.concatenate([q_sem, q_geo * ((2 - 2 * g) / 4**0.5)], -1)
    k = jnp.concatenate([heads(layer.k_sem), k_geo], -1)
    y = jax.nn.dot_product_attention(q, k, heads(layer.v_proj), scale=1, is_causal=True)
    want = layer.o_proj(y.reshape(2, 6, -1))
    assert_close(call(layer, x), want, dtype="float32", length=20)


def test_the_gate_does_nothing_at_initialisation():
    x = normal((5, 8), 0)
    gated, plain = (
        DecoupledAttention(8, 2, None, 4, 8, decoupled_gate=gate, key=KEY)
        for gate in (True, False)
    )
    np.testing.assert_array_equal(call(gated, x), call(plain, x))
    opened = eqx.tree_at(lambda m: m.gate, gated, jnp.asarray([2.0, -1.0]))
    assert np.any(np.abs(call(opened, x) - call(plain, x)) > 1e-3)


@given(seed=seeds)
@settings(max_examples=8)
def test_the_semantic_path_is_blind_to_positions(seed):
    """With the geometric path shut, tokens in another order give the same, moved."""
    make = functools.partial(DecoupledAttention, 8, 2, None, 4, 8, is_causal=False)
    layer = moved(make(decoupled_gate=True, key=KEY), seed)
    # sigmoid(40) is 1 in float32: the geometric path has weight 0.
    layer = eqx.tree_at(lambda m: m.gate, layer, jnp.full(2, 40.0))
    x = normal((6, 8), seed)
    order = np.random.default_rng(seed).permutation(6)
    assert_close(
        call(layer, x[order]), call(layer, x)[order], dtype="float32", length=20
    )
    open_ = eqx.tree_at(lambda m: m.gate, layer, jnp.zeros(2))
    turned = np.roll(np.arange(6), 1)
    moved_too = call(open_, x[turned]) - call(open_, x)[turned]
    assert np.any(np.abs(moved_too) > 1e-4), "the geometric path sees positions"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_a_cache_follow_the_formula(dtype):
    """2048 wide with 32 heads, the sizes of the table in the documentation."""
    makers = {
        4096: lambda: Attention(2048, 32, dtype=dtype, key=KEY),
        1024: lambda: Attention(2048, 32, 8, dtype=dtype, key=KEY),
        768: lambda: DecoupledAttention(2048, 32, dtype=dtype, key=KEY),
        192: lambda: DecoupledAttention(2048, 32, 8, dtype=dtype, key=KEY),
        2432: lambda: DecoupledAttention(2048, 32, v_dim=2048, dtype=dtype, key=KEY),
    }
    itemsize = jnp.dtype(dtype).itemsize
    for elements, make in makers.items():
        layer = eqx.filter_eval_shape(make)
        cache = eqx.filter_eval_shape(layer.init_cache, (3,), max_len=11)
        assert layer.cache_elements == elements
        held = sum(x.size * x.dtype.itemsize for x in (cache.key, cache.value))
        assert held == 3 * 11 * elements * itemsize
        rest = sum(x.size * x.dtype.itemsize for x in (cache.length, cache.segment))
        assert rest == 3 * 2 * 4


def test_a_ring_is_never_full_and_holds_the_window():
    layer = moved(Attention(4, 2, 1, rope_enabled=True, window=3, key=KEY), 2)
    x = normal((2, 11, 4), 7)
    want = call(layer, x)
    cache = layer.init_cache((2,))
    assert cache.slots == 3
    for start, stop in ((0, 2), (2, 7), (7, 8)):
        y, cache = prefill(layer, x[:, start:stop], cache)
        assert_close(y, want[:, start:stop], dtype="float32", length=20)
    for t in range(8, 11):
        y, cache = step(layer, x[:, t], cache)
        assert_close(y, want[:, t], dtype="float32", length=20)
    np.testing.assert_array_equal(cache.length, [11, 11])


def test_a_short_cache_of_a_long_window_is_no_ring():
    layer = Attention(4, 2, window=5, key=KEY)
    cache = layer.init_cache(max_len=2)
    _, cache = prefill(layer, normal((2, 4), 0), cache)
    with pytest.raises(RuntimeError, match="cache is full: it holds 2 tokens"):
        step(layer, normal((4,), 1), cache)


@pytest.mark.parametrize("read", ["prefill", "step"])
def test_a_full_cache_is_an_error(read):
    layer = LAYERS["decoupled"][0]
    cache = layer.init_cache((2,), max_len=4)
    x = normal((2, 4, 8), 0)
    _, cache = prefill(layer, x, cache)
    more, x = (step, normal((2, 8), 1)) if read == "step" else (prefill, x[:, :3])
    with pytest.raises(RuntimeError, match="larger `max_len`"):
        more(layer, x, cache)


def test_rows_of_unequal_length_share_a_cache():
    layer = moved(Attention(4, 2, rope_enabled=True, key=KEY), 4)
    x = normal((2, 5, 4), 8)
    ids = jnp.asarray([[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]])
    _, cache = prefill(layer, x, layer.init_cache((2,), max_len=8), ids)
    np.testing.assert_array_equal(cache.length, [3, 5])
    more = normal((2, 3, 4), 9)
    y, cache = prefill(layer, more, cache)
    np.testing.assert_array_equal(cache.length, [6, 8])
    for row, start in ((0, 2), (1, 0)):
        whole = jnp.concatenate([x[row, start:], more[row]])
        assert_close(y[row], call(layer, whole)[-3:], dtype="float32", length=20)


def test_a_cache_is_a_value_that_can_be_rolled_back():
    layer = LAYERS["everything"][0]
    x = normal((6, 8), 1)
    _, cache = prefill(layer, x[:3], layer.init_cache(max_len=6))
    first, _ = step(layer, x[3], cache)
    _, other = step(layer, x[4], cache)
    again, _ = step(layer, x[3], cache)
    np.testing.assert_array_equal(first, again)
    assert isinstance(other, KVCache)
    assert np.any(np.asarray(other.key) != np.asarray(cache.key))


def test_dropout_needs_training_and_changes_the_result():
    layer = Attention(8, 2, dropout_p=0.5, key=KEY)
    x = normal((6, 8), 1)
    # 1000 draws at once, of which the first are compared one by one.
    drawn = quick(jax.vmap(lambda key: layer(x, key=key)))
    draws = np.asarray(drawn(jax.random.split(KEY, 1000)))
    plain = np.asarray(call(eqx.nn.inference_mode(layer), x))
    np.testing.assert_array_equal(drawn(jax.random.split(KEY, 1000)), draws)
    assert np.any(draws[0] != draws[1])
    assert np.any(draws[0] != plain)
    # The expectation is the plain result.
    error = np.abs(np.mean(draws, 0) - plain)
    spread = np.std(draws, axis=0) / 1000**0.5
    assert np.all(error < 5 * spread + 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "blockwise"])
def test_the_implementation_is_passed_on(implementation):
    layer = Attention(6, 2, window=3, implementation=implementation, key=KEY)
    x = normal((5, 6), 2)
    assert_close(
        call(layer, x), attention_row(layer, np.asarray(x)), dtype="float32", length=80
    )
    text = str(jax.make_jaxpr(lambda x: layer(x))(x))
    assert ("custom_jvp" in text) == (implementation == "blockwise")
