"""Attention to another sequence, and plain self-attention, against peers and loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import attention_oracle
from support.attention_oracle import affine, rms_norm
from support.model_oracle import moved
from support.numpy_oracles import wide
from support.tolerances import assert_close

from capibara_eqx.layers import CrossAttention, SelfAttention


seeds = st.integers(0, 2**32 - 1)
KEY = jax.random.key(0)
call = eqx.filter_jit(lambda layer, *args, **kwargs: layer(*args, **kwargs))


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def loop(layer, x, context, mask=None):
    """`CrossAttention` of one row."""
    x, context = wide(x), wide(context)
    heads = lambda m, x, n: affine(m, x).reshape(len(x), n, -1)
    q = heads(layer.q_proj, x, layer.n_heads)
    k = heads(layer.k_proj, context, layer.n_kv_heads)
    v = heads(layer.v_proj, context, layer.n_kv_heads)
    if layer.q_norm is not None:
        q = rms_norm(q, wide(layer.q_norm.weight), layer.q_norm.eps)
        k = rms_norm(k, wide(layer.k_norm.weight), layer.k_norm.eps)
    mask = None if mask is None else np.asarray(mask)[None]
    y = attention_oracle.attention(q, k, v, mask=mask)
    return affine(layer.o_proj, y.reshape(len(x), -1))


@settings(max_examples=10)
@given(masked=st.booleans(), seed=seeds)
def test_cross_attention_equals_the_loop(masked, seed):
    layer = CrossAttention(
        6, 4, 2, 3, d_context=5, qk_norm=True, use_bias=True, key=KEY
    )
    layer = moved(layer, seed)
    x, context = normal((2, 4, 6), seed), normal((2, 7, 5), seed + 1)
    mask = None
    if masked:
        mask = np.random.default_rng(seed).random((2, 4, 7)) < 0.5
    got = call(layer, x, context, mask=None if mask is None else jnp.asarray(mask))
    for row in range(2):
        want = loop(layer, x[row], context[row], None if mask is None else mask[row])
        assert_close(got[row], want, dtype="float32", length=60)


def test_a_token_that_sees_nothing_gets_the_bias():
    layer = moved(CrossAttention(6, 2, use_bias=True, key=KEY), 1)
    mask = jnp.zeros((1, 5), bool).at[:, 1:3].set(True)
    x, context = normal((4, 6), 0), normal((5, 6), 1)
    y = call(layer, x, context, mask=mask)
    other = call(layer, x, context.at[jnp.asarray([0, 3, 4])].add(1.0), mask=mask)
    np.testing.assert_array_equal(y, other)
    hidden = call(layer, x, context, mask=mask & False)
    assert_close(hidden, np.tile(layer.o_proj.bias, (4, 1)), dtype="float32")


@settings(max_examples=8)
@given(masked=st.booleans(), seed=seeds)
def test_self_attention_is_that_of_equinox(masked, seed):
    layer = eqx.nn.inference_mode(moved(SelfAttention(6, 3, key=KEY), seed))
    peer = eqx.nn.MultiheadAttention(
        3,
        6,
        use_query_bias=True,
        use_key_bias=True,
        use_value_bias=True,
        use_output_bias=True,
        key=KEY,
    )
    names = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    for ours, theirs in names:
        source = getattr(layer.attention, f"{ours}_proj")
        where = lambda m, theirs=theirs: (
            getattr(m, f"{theirs}_proj").weight,
            getattr(m, f"{theirs}_proj").bias,
        )
        peer = eqx.tree_at(where, peer, (source.weight, source.bias))
    x = normal((5, 6), seed)
    mask = None
    if masked:
        mask = jnp.asarray(np.random.default_rng(seed).random((5, 5)) < 0.6)
        mask = mask | jnp.eye(5, dtype=bool)
    assert_close(
        call(layer, x, mask=mask),
        peer(x, x, x, mask=mask),
        dtype="float32",
        length=30,
    )


@settings(max_examples=8)
@given(seed=seeds)
def test_self_attention_knows_no_order(seed):
    layer = eqx.nn.inference_mode(moved(SelfAttention(6, 2, key=KEY), seed))
    x = normal((7, 6), seed)
    order = np.random.default_rng(seed).permutation(7)
    assert_close(
        call(layer, x[order]), call(layer, x)[order], dtype="float32", length=30
    )


def test_a_causal_mask_hides_the_future():
    layer = eqx.nn.inference_mode(SelfAttention(6, 2, key=KEY))
    mask = jnp.tril(jnp.ones((5, 5), bool))
    x = normal((5, 6), 2)
    before, after = call(layer, x, mask=mask), call(layer, x.at[3].add(1.0), mask=mask)
    np.testing.assert_array_equal(before[:3], after[:3])
    assert np.all(np.any(before[3:] != after[3:], axis=-1))


@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
def test_batch_axes_are_vmap(batch):
    layer = eqx.nn.inference_mode(moved(SelfAttention(6, 2, key=KEY), 1))
    x = normal((*batch, 4, 6), 3)
    mask = jnp.asarray(np.random.default_rng(0).random((*batch, 1, 4)) < 0.7)
    run = lambda x, mask: layer(x, mask=mask)
    for _ in batch:
        run = jax.vmap(run)
    assert_close(call(layer, x, mask=mask), run(x, mask), dtype="float32", length=30)


def test_defaults_are_those_of_the_plain_layer():
    layer = eqx.filter_eval_shape(SelfAttention, key=KEY)
    assert (layer.d_model, layer.attention.n_heads) == (768, 12)
    assert layer.attention.dropout.p == 0.1
