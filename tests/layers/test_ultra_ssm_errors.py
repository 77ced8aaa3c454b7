"""What the residual block refuses, alike in chunks and without."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused
from support.quick import filled
from support.small_layers import ultra
from support.tolerances import assert_close

from capibara_eqx.layers import (
    Attention,
    Bidirectional,
    Conv1DBlock,
    HybridSSM,
    Mamba,
    UltraSSM,
)


KEY = jax.random.key(0)
LENGTH = 7
PACKED = jnp.asarray([3, 3, 3, 5, -1, 5, -1], "int32")


@functools.cache
def layer_of(inside="mamba", **options):
    return filled(ultra, inside, seed=0, size=0.5, **options)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@eqx.filter_jit
def call(layer, x, ids=None):
    return layer(x, segment_ids=ids)


def around(make, chunk_size):
    """A block around the mixer that `make` gives for a key."""

    def build(*, key):
        mixer = make(key)
        options: dict[str, Any] = {"compute_dtype": None, "chunk_size": chunk_size}
        return UltraSSM(mixer, mixer.d_model, **options, key=key)

    return filled(build, seed=0, size=0.5)


def dropping(key, p=0.5):
    return Attention(4, 2, dropout_p=p, key=key)


def test_chunks_with_a_mixer_whose_dropout_is_off():
    x = random((LENGTH, 4), 12)
    whole, parts = (eqx.nn.inference_mode(around(dropping, size)) for size in (None, 3))
    want = call(whole, x)
    assert_close(call(parts, x), want, dtype="float32", length=60)
    never = around(functools.partial(dropping, p=0.0), 3)
    assert eqx.filter_eval_shape(call, never, x).shape == x.shape


BAD = [
    ({"d_model": 0}, ["`d_model`", "positive integer"]),
    ({"d_ff": 0}, ["`d_ff`", "positive integer"]),
    ({"chunk_size": 0}, ["`chunk_size`", "positive integer"]),
    ({"chunk_size": 2.5}, ["`chunk_size`", "positive integer"]),
    ({"eps": 0.0}, ["`eps`", "positive"]),
    ({"dropout_rate": 1.5}, ["`dropout_rate`", "between 0 and 1"]),
    ({"compute_dtype": "bf16"}, ["`compute_dtype`", "'bf16'", "'bfloat16'"]),
    ({"compute_dtype": "int8"}, ["`compute_dtype`", "'bfloat16'", "'int8'"]),
    ({"compute_dtype": "complex64"}, ["`compute_dtype`", "'float32'", "complex64"]),
    ({"compute_dtype": "float8_e4m3fn"}, ["`compute_dtype`", "'float8_e4m3fn'"]),
]


@pytest.mark.errors
@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_arguments(options, words):
    conv = layer_of("conv").mixer
    with refused(*words):
        UltraSSM(conv, **({"d_model": 3} | options), key=KEY)


@pytest.mark.errors
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dropout_needs_a_key(chunk_size):
    layer = layer_of("conv", dropout_rate=0.5, chunk_size=chunk_size)
    with refused("`key` is needed", "inference_mode"):
        layer(random((LENGTH, 3)))


class Dropping(Mamba):
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        super().__init__(4, 2, key=key)
        self.dropout = eqx.nn.Dropout(0.5)


def mix_of_one_that_drops(key):
    return HybridSSM(4, mode="mix", attention=dropping(key), key=key)


@pytest.mark.errors
@pytest.mark.parametrize("make", [dropping, Dropping, mix_of_one_that_drops])
@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_chunks_do_not_leave_out_the_dropout_of_the_mixer(make, length):
    layer, x = around(make, 3), random((length, 4))
    for key in (None, KEY):
        with refused("`mixer`", "`dropout_rate`", "`chunk_size`", "inference_mode"):
            layer(x, key=key)


def switch(key):
    return HybridSSM(4, 3, n_heads=2, key=key)


def block_of_a_switch(key):
    return UltraSSM(switch(key), 4, key=key)


def mix_with_a_switch(key):
    return HybridSSM(4, mode="mix", ssm=switch(key), n_heads=2, key=key)


@pytest.mark.errors
@pytest.mark.parametrize("make", [switch, block_of_a_switch, mix_with_a_switch])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_switch_does_not_choose_by_the_length_of_packed_rows(make, chunk_size):
    layer = around(make, chunk_size)
    for length in (2, LENGTH):
        x, ids = random((length, 4)), PACKED[:length]
        with refused("`segment_ids`", "HybridSSM", '`mode="mix"`', "one branch"):
            layer(x, segment_ids=ids)


@pytest.mark.parametrize("options", [{"mode": "mix"}, {"use_transformer": False}])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_other_hybrids_take_packed_rows(options, chunk_size):
    layer = around(lambda key: HybridSSM(4, **options, key=key), chunk_size)
    x = random((LENGTH, 4))
    assert eqx.filter_eval_shape(call, layer, x, PACKED).shape == x.shape


@pytest.mark.errors
def test_mixers_that_are_none_of_the_width():
    conv = layer_of("conv").mixer
    encoder: Any = Bidirectional(conv, conv, 3, key=KEY)
    with refused("UltraSSM: `mixer`", "sequence mixer", "got Bidirectional"):
        UltraSSM(encoder, 3, key=KEY)
    with refused("UltraSSM: `mixer`", "d_model=4", "Mamba of d_model=3"):
        UltraSSM(layer_of().mixer, 4, key=KEY)


@pytest.mark.errors
def test_a_mixer_that_does_not_fit():
    wider = filled(Conv1DBlock, 3, 4, 2, seed=0, size=0.5)
    with refused("UltraSSM: `mixer`", "(7, 3)", "(7, 4)"):
        UltraSSM(wider, 3, key=KEY)(random((LENGTH, 3)))


@pytest.mark.errors
def test_inputs_that_do_not_fit():
    layer = layer_of()
    with refused("UltraSSM: `x`", "3 elements", "(7, 4)"):
        layer(random((LENGTH, 4)))
    with refused("UltraSSM.step: `x`", "3 elements", "(4,)"):
        layer.step(random((4,)), layer.init_cache())
    with refused("`segment_ids`", "(2,)", "(7,)"):
        layer(random((2, 3)), segment_ids=PACKED)
    with refused("`cache", "batch shape"):
        layer.prefill(random((2, 3)), layer.init_cache((2,)))
