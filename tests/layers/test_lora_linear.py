"""The affine map with an adapter, against loops in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lora_oracle import adapter_of, moved_adapters, whole
from support.quick import built
from support.tolerances import as_wide, assert_close

from capibara_eqx.arrays import LoRA
from capibara_eqx.layers import Attention, LoRALinear, UltraSSM
from capibara_eqx.transforms import (
    Affine,
    Rule,
    attention_rules,
    lora,
    merge,
    quantize,
    trainable_spec,
    with_dropout_key,
)


KEY = jax.random.key(0)
call = eqx.filter_jit(lambda layer, x, key=None: layer(x, key=key))


def layer(**options):
    return built(LoRALinear, 7, 5, 2, **options, key=KEY)


@given(dora=st.booleans(), batch=st.sampled_from([(), (4,)]), seed=st.integers(0, 99))
def test_the_map_is_that_of_the_loop(dora, batch, seed):
    made = moved_adapters(LAYERS[dora], seed)
    x = np.random.default_rng(seed).standard_normal((*batch, 7)).astype("float32")
    matrix = whole(adapter_of(made.weight))
    want = as_wide(x) @ matrix.T + as_wide(made.bias)
    terms = float(np.max(np.abs(matrix)) * np.max(np.abs(x)))
    got = call(made, jnp.asarray(x))
    assert_close(got, want, dtype="float32", length=16, terms=terms)


LAYERS = {dora: layer(alpha=3, dora=dora) for dora in (False, True)}


def test_the_arguments_reach_the_adapter():
    made = layer(alpha=16, dropout=0.25, rs=True, use_bias=False, dtype="bfloat16")
    assert made.weight.spec == LoRA(2, 16, 0.25, rs=True, dtype="bfloat16")
    assert made.bias is None
    assert made.rank == 2
    assert {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(made, eqx.is_array))} == {
        jnp.dtype("bfloat16")
    }
    assert layer().weight.spec.scale == 1


def test_dropout_by_the_key_of_the_call_or_of_the_weight():
    made = moved_adapters(layer(dropout=0.5), 0)
    x = jnp.ones((2, 7))
    key = jax.random.key(3)
    y = call(made, x, key)
    np.testing.assert_array_equal(y, call(made, x, key))
    assert np.max(np.abs(y - call(made, x, jax.random.key(4)))) > 0.1
    by_weight = call(with_dropout_key(made, key), x)
    assert np.max(np.abs(by_weight - call(eqx.nn.inference_mode(made), x))) > 0.1
    off = call(eqx.nn.inference_mode(made), x, key)
    np.testing.assert_array_equal(off[0], off[1])


def test_transforms_know_the_layer():
    made = moved_adapters(layer(alpha=3), 1)
    mask = trainable_spec(made)
    assert mask.weight.a is True
    assert mask.weight.base is False
    assert mask.bias is False
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 7)), "float32")
    merged = merge(made)
    assert_close(call(merged, x), call(made, x), dtype="float32", length=16)
    small, found = quantize(merged, [Rule("weight", Affine(8))])
    assert found.entries[0].scheme == "int8"
    assert np.max(np.abs(call(small, x) - call(merged, x))) < 0.1


def test_chunks_need_a_mixer_without_dropout_in_its_adapters():
    """A mask of one chunk is not that of the row."""
    mixer = built(Attention, 4, 2, key=KEY)
    mixer, _ = lora(mixer, attention_rules(LoRA(1, dropout=0.5)), key=KEY)
    whole_row = built(UltraSSM, mixer, 4, chunk_size=3, key=KEY)
    with pytest.raises(ValueError, match="dropout"):
        with_dropout_key(whole_row, KEY)(jnp.ones((5, 4)))
