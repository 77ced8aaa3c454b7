"""The language model against NumPy loops; its caches against its full forward."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.layer_cases import packed_rows, seeds
from support.model_oracle import blocks_of, model_row, moved
from support.tolerances import assert_close

from capibara_eqx.layers import Mamba
from capibara_eqx.models import (
    LanguageModel,
    ModelOutput,
    ResidualBlock,
    mamba_language_model,
)


VOCAB, D, SEQ = 11, 3, 6


@functools.cache
def make(scan=False, tied=True):
    model = mamba_language_model(
        VOCAB,
        D,
        2,
        d_state=2,
        d_conv=3,
        scan=scan,
        tie_embeddings=tied,
        key=jax.random.key(0),
    )
    return moved(model, 0)


def jit(function) -> Any:
    return eqx.filter_jit(function)


@functools.cache
def compiled_forward():
    return jit(lambda model, tokens, ids: model(tokens, segment_ids=ids))


def tokens_of(shape, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, VOCAB, shape), "int32")


close = functools.partial(assert_close, dtype="float32", length=50)


@pytest.mark.parametrize("scan", [False, True], ids=["list", "scanned"])
@given(tied=st.booleans(), row=packed_rows, seed=seeds)
def test_logits_are_those_of_the_loops(scan, tied, row, seed):
    model, tokens = make(scan, tied), tokens_of(SEQ, seed)
    ids = np.asarray(row, "int32")
    logits = compiled_forward()(model, tokens, ids)
    want = model_row(model, np.asarray(tokens), ids)
    close(np.asarray(logits)[ids >= 0], want[ids >= 0])


def test_without_ids_a_row_is_one_document():
    tokens = tokens_of((2, SEQ), 1)
    logits = compiled_forward()(make(), tokens, None)
    want = [model_row(make(), np.asarray(row)) for row in tokens]
    close(logits, np.stack(want))


def test_a_tied_head_is_the_embedding():
    model, tokens = make(), tokens_of(SEQ, 2)
    assert model.head is None

    def normed(model, tokens):
        return model.norm(model.stack(model.embedding(tokens))[0])

    x = np.asarray(jit(normed)(model, tokens), "float64")
    want = x @ np.asarray(model.embedding.weight, "float64").T
    close(compiled_forward()(model, tokens, None), want)


def test_both_uses_of_a_tied_table_reach_its_gradient():
    # Token 0 goes in, the score of token 5 is the loss: nothing else is looked up.
    def loss(model):
        return model(jnp.zeros(SEQ, "int32"))[0, 5] ** 2

    gradient = jit(lambda model: eqx.filter_grad(loss)(model))(make()).embedding.weight
    used = np.any(np.asarray(gradient) != 0, axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(used), [0, 5])


def test_an_untied_head_is_its_own():
    model = make(tied=False)
    assert model.head.weight.shape == (VOCAB, D)
    assert model.head.bias is None
    zero = eqx.tree_at(lambda m: m.head.weight, model, jnp.zeros((VOCAB, D)))
    assert not np.any(compiled_forward()(zero, tokens_of(SEQ, 3), None))


@pytest.mark.parametrize("scan", [False, True], ids=["list", "scanned"])
def test_cached_logits_are_those_of_the_full_forward(scan):
    model, tokens = make(scan), tokens_of((2, SEQ), 4)
    want = compiled_forward()(model, tokens, None)
    prefill = jit(lambda model, tokens, cache: model.prefill(tokens, cache))
    step = jit(lambda model, token, cache: model.step(token, cache))
    cache = model.init_cache((2,), max_len=SEQ)
    read, cache = prefill(model, tokens[:, :2], cache)
    parts = [*jnp.moveaxis(read, 1, 0)]
    for t in range(2, SEQ):
        logits, cache = step(model, tokens[:, t], cache)
        parts.append(logits)
    close(jnp.stack(parts, axis=1), want)
    close(jnp.argmax(jnp.stack(parts, axis=1), -1), jnp.argmax(want, -1))


def test_forward_is_the_call_and_what_layers_report():
    model, tokens = make(), tokens_of(SEQ, 5)
    output = jit(lambda model, tokens: model.forward(tokens))(model, tokens)
    assert isinstance(output, ModelOutput)
    close(output.logits, compiled_forward()(model, tokens, None))
    assert jax.tree.leaves(output.aux) == []


def test_a_model_in_bfloat16_returns_it():
    model = mamba_language_model(
        VOCAB, D, 1, d_state=2, dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    logits = jax.eval_shape(lambda tokens: model(tokens), tokens_of(SEQ, 6))
    assert logits.dtype == jnp.bfloat16
    states = [c for c in jax.tree.leaves(model.init_cache()) if c.dtype != jnp.int32]
    assert {state.dtype for state in states} == {jnp.dtype("float32")}


def read(model, tokens):
    return model.prefill(tokens, model.init_cache())[0]


def test_dropout_acts_in_training_alone():
    model = mamba_language_model(
        VOCAB, D, 2, d_state=2, dropout=0.5, key=jax.random.key(0)
    )
    tokens = tokens_of(SEQ, 7)
    call = jit(lambda model, key: model(tokens, key=key))
    one, two = (call(model, jax.random.key(seed)) for seed in (1, 2))
    assert np.any(np.asarray(one) != np.asarray(two))
    np.testing.assert_array_equal(one, call(model, jax.random.key(1)))
    quiet = eqx.nn.inference_mode(model)
    want = model_row(quiet, np.asarray(tokens))
    close(compiled_forward()(quiet, tokens, None), want)
    close(jit(read)(model, tokens), want)


@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.parametrize("scan", [False, True])
def test_output_maps_start_smaller_in_deeper_models(n_layers, scan):
    model = mamba_language_model(
        VOCAB, 16, n_layers, d_state=1, scan=scan, key=jax.random.key(1)
    )
    limit = 1 / np.sqrt(32 * n_layers)
    weights = []
    for block in blocks_of(model.stack):
        weight = np.asarray(block.mixer.out_proj.weight, "float64").ravel()
        assert np.max(np.abs(weight)) <= limit * (1 + 1e-6)
        assert stats.kstest(weight, "uniform", (-limit, 2 * limit)).pvalue > 1e-3
        weights.append(weight)
    assert len({weight.tobytes() for weight in weights}) == n_layers


def test_arguments_reach_the_parts():
    model: Any = mamba_language_model(
        VOCAB,
        4,
        2,
        dropout=0.25,
        remat="full",
        tie_embeddings=False,
        d_state=5,
        d_conv=2,
        expand=3,
        dt_rank=2,
        activation="gelu",
        key=jax.random.key(0),
    )
    block = model.stack.blocks[1]
    mixer = block.mixer
    assert (mixer.d_state, mixer.d_inner, mixer.dt_rank) == (5, 12, 2)
    assert (mixer.conv.kernel_size, mixer.conv.activation) == (2, "gelu")
    assert (block.dropout.p, model.stack.remat) == (0.25, "full")
    assert model.head is not None


def test_a_model_of_any_blocks():
    keys = jax.random.split(jax.random.key(0), 3)
    blocks = [ResidualBlock(Mamba(D, 2, key=key), D) for key in keys[1:]]
    model = moved(LanguageModel(VOCAB, D, blocks, key=keys[0]), 1)
    tokens = tokens_of(SEQ, 8)
    close(compiled_forward()(model, tokens, None), model_row(model, np.asarray(tokens)))
