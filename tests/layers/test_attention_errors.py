"""What the attention layers refuse, and in which words."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.kernels import attention
from capibara_eqx.layers import (
    Attention,
    CrossAttention,
    DecoupledAttention,
    LinearScaling,
    Llama3Scaling,
    Mamba,
    SelfAttention,
    YaRNScaling,
    rotary,
    rotary_frequencies,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
LAYER = Attention(4, 2, key=KEY)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((6, 4), ("`d_model`", "multiple of `n_heads`", "d_model=6", "n_heads=4")),
        ((4, 0), ("`n_heads`", "positive integer", "0")),
        ((8, 4, 3), ("`n_kv_heads` must divide `n_heads`", "n_kv_heads=3")),
        ((8, 4, 0), ("`n_kv_heads`", "positive integer")),
        ((8, 4, None, 0), ("`head_dim`", "positive integer")),
        ((6, 2, None, None, True), ("`head_dim` must be even", "got 3")),
        ((8, 2, None, None, True, 0.0), ("`rope_base`", "positive", "0.0")),
    ],
    ids=str,
)
def test_sizes_of_attention(arguments, words):
    with refused(*words):
        Attention(*arguments, key=KEY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_p": 1.5}, ("`dropout_p`", "between 0 and 1", "1.5")),
        ({"window": 0}, ("`window`", "positive integer", "0")),
        ({"eps": 0.0, "qk_norm": True}, ("`eps`", "positive")),
        ({"eps": -1.0}, ("`eps`", "positive")),
        (
            {"rope_enabled": True, "rope_scaling": "linear"},
            ("`scaling` must be LinearScaling", "'linear'"),
        ),
    ],
    ids=str,
)
def test_options_of_attention(options, words):
    with refused(*words):
        Attention(4, 2, key=KEY, **options)


@pytest.mark.parametrize(
    "build",
    [Attention, partial(DecoupledAttention, sem_dim=8, geo_dim=8), CrossAttention],
)
def test_an_unknown_implementation(build):
    with refused("attention", "`implementation`", "'blokwise'", "mean 'blockwise'"):
        build(4, 2, implementation="blokwise", key=KEY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sem_dim": 7}, ("`sem_dim`", "multiple of `n_heads`", "sem_dim=7")),
        ({"geo_dim": 6}, ("`geo_dim`", "multiple of `n_heads`")),
        ({"geo_dim": 4}, ("`geo_dim / n_heads` must be even", "got 1")),
        ({"v_dim": 10}, ("`v_dim`", "multiple of `n_heads`")),
        ({"n_kv_heads": 3}, ("`n_kv_heads` must divide",)),
    ],
    ids=str,
)
def test_sizes_of_decoupled_attention(options, words):
    with refused(*words):
        DecoupledAttention(8, 4, key=KEY, **{"sem_dim": 8, "geo_dim": 8, **options})


def test_a_cache_needs_a_length():
    with refused("Attention", "`max_len` is needed", "`window`"):
        LAYER.init_cache((2,))
    with refused("`max_len`", "positive integer"):
        LAYER.init_cache(max_len=0)


def test_a_layer_that_sees_the_future_has_no_cache():
    layer = Attention(4, 2, is_causal=False, key=KEY)
    with refused("it is not causal", "`is_causal=True`"):
        layer.init_cache(max_len=4)


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (Mamba(4, key=KEY).init_cache(), ("must be a KVCache", "got MambaCache")),
        (
            LAYER.init_cache((3,), max_len=4),
            ("`cache.key` has shape (3, 2, 4, 2)", "expected (2, 4, 2)"),
        ),
        (
            Attention(4, 1, key=KEY).init_cache(max_len=4),
            ("`cache.key` has shape (1, 4, 4)", "init_cache"),
        ),
    ],
    ids=["of_mamba", "of_a_batch", "of_other_heads"],
)
def test_a_cache_of_another_layer(cache, words):
    with refused(*words):
        LAYER.step(jnp.ones(4), cache)


def test_inputs_that_do_not_fit():
    with refused("Attention: `x` must have 4 elements on its last axis", "(2, 3)"):
        LAYER(jnp.ones((2, 3)))
    with refused("Attention: `segment_ids`", "(2, 3)", "(3,)"):
        LAYER(jnp.ones((2, 3, 4)), segment_ids=jnp.zeros(3, jnp.int32))
    layer = CrossAttention(4, 2, key=KEY)
    with refused("same batch axes", "(2, 3, 4)", "(3, 4)"):
        layer(jnp.ones((2, 3, 4)), jnp.ones((3, 4)))
    with refused("CrossAttention: `context` must have 4 elements"):
        layer(jnp.ones((3, 4)), jnp.ones((3, 5)))
    layer = eqx.nn.inference_mode(SelfAttention(4, 2, key=KEY))
    for mask in (jnp.ones((3, 3)), jnp.ones((3, 2), bool), jnp.ones(3, bool)):
        with refused("SelfAttention: `mask` must be boolean", "(3, 3)"):
            layer(jnp.ones((3, 4)), mask=mask)


def test_dropout_without_a_key():
    for layer in (
        Attention(4, 2, dropout_p=0.1, key=KEY),
        SelfAttention(4, 2, key=KEY),
    ):
        with refused("`key` is needed", "inference_mode"):
            layer(jnp.ones((3, 4)))


def test_rotary_embedding():
    with refused("`head_dim` must be even", "got 5"):
        rotary(jnp.ones((3, 1, 5)), jnp.arange(3))
    with refused("`positions`", "(3,)", "(4,)"):
        rotary(jnp.ones((3, 1, 4)), jnp.arange(4))
    with refused("`base`", "positive"):
        rotary_frequencies(4, -1.0)
    for scaling, words in (
        (LinearScaling(0.0), ("`factor`", "positive")),
        (YaRNScaling(2.0, 0), ("`original_max_len`", "positive")),
        (Llama3Scaling(8.0, 4.0, 1.0, 64), ("`low_freq_factor`", "swapped")),
    ):
        with refused(*words):
            rotary_frequencies(4, 10.0, scaling)
    with refused("`base` must be above 1"):
        rotary_frequencies(4, 1.0, YaRNScaling(2.0, 64))


Q, K = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 6, 2, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"query": Q[..., 0]}, ("`key`", "batch axes")),
        ({"query": Q[0, 0]}, ("`query`", "(*batch, length, heads, width)")),
        ({"key": K[..., :4]}, ("`key`", "width of `query`", "(2, 6, 2, 4)")),
        ({"value": K[:, :5]}, ("`value`", "length and heads of `key`")),
        ({"query": Q[..., :3, :]}, ("must divide those of `query`", "2 and 3")),
        ({"window": 0}, ("`window`", "positive integer")),
        ({"value": jnp.ones(K.shape, int)}, ("`value` must be floating", "int32")),
        ({"mask": jnp.ones((2, 3, 6), bool)}, ("`mask`", "mask[..., None, :, :]")),
        ({"mask": jnp.ones((2, 1, 3, 6))}, ("`mask` must be boolean", "float32")),
        (
            {"query_segments": jnp.zeros((2, 3), jnp.int32)},
            ("`key_segments` is missing",),
        ),
        (
            {"key_positions": jnp.zeros((2, 6), jnp.int32)},
            ("`query_positions` is missing",),
        ),
        (
            {
                "query_positions": jnp.zeros((2, 3)),
                "key_positions": jnp.zeros((2, 6), jnp.int32),
            },
            ("`query_positions` must be of integers", "float32"),
        ),
        ({"dropout_p": 0.5}, ("`dropout_key` is needed",)),
        ({"dropout_p": -0.5}, ("`dropout_p`", "between 0 and 1")),
        (
            {"implementation": "block"},
            ("unknown `implementation` 'block'", "blockwise"),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_arguments_of_the_kernel(options, words):
    arguments = {"query": Q, "key": K, "value": K, **options}
    with refused(*words):
        attention(**arguments)


def test_what_an_implementation_cannot():
    with pytest.raises(NotImplementedError, match="no dropout; use 'blockwise'"):
        attention(Q, K, K, dropout_p=0.1, dropout_key=KEY, implementation="xla")
    with pytest.raises(NotImplementedError, match="runs on cuda"):
        attention(Q, K, K, implementation="cudnn")
    # The first that can serves.
    y = attention(Q, K, K, implementation=("cudnn", "xla"))
    assert y.shape == Q.shape
