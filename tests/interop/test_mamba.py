"""Checkpoints of Mamba, by the names that transformers gives to what they hold.

The tensors and the logits come from NumPy, so that nothing here needs transformers.
"""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.checkpoint_oracle import MAMBA_CONFIG, mamba_logits, mamba_shapes, write
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.models import mamba_language_model


BATCH, LENGTH = 2, 6
ODD = {
    "use_bias": True,
    "use_conv_bias": False,
    "tie_word_embeddings": False,
    "expand": 3,
    "intermediate_size": 12,
    "time_step_rank": 3,
    "hidden_act": "gelu",
    "layer_norm_epsilon": 0.01,
    "conv_kernel": 1,
    "residual_in_fp32": False,
}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "odd": (ODD, False),
}


@eqx.filter_jit
def every_way(model, tokens):
    """Logits of the whole text, of it in unequal chunks, and token by token."""
    fresh = model.init_cache((BATCH,))

    def step(cache, token):
        logits, cache = model.step(token, cache)
        return cache, logits

    first, cache = model.prefill(tokens[:, :2], fresh)
    second, _ = model.prefill(tokens[:, 2:], cache)
    _, steps = jax.lax.scan(step, fresh, tokens.T)
    return {
        "whole": model(tokens),
        "chunks": jnp.concatenate([first, second], axis=1),
        "steps": jnp.swapaxes(steps, 0, 1),
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_tensors(name, tmp_path):
    changed, scan = CASES[name]
    config = MAMBA_CONFIG | changed
    tensors = write(tmp_path, config, mamba_shapes(config))
    tokens = np.random.default_rng(3).integers(0, 11, (BATCH, LENGTH))
    expected = np.stack([mamba_logits(config, tensors, row) for row in tokens])
    model = load_hf(tmp_path, scan=scan)
    for way, found in every_way(model, jnp.asarray(tokens, "int32")).items():
        # Sums of up to 12 terms through two layers.
        assert_close(found, expected, dtype=np.float32, length=48, name=way)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_again(name, scan, tmp_path):
    config = MAMBA_CONFIG | CASES[name][0]
    tensors = write(tmp_path, config, mamba_shapes(config))
    model = load_hf(tmp_path, scan=scan)
    save_hf(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key, strict=True)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    kept = (written.keys() & config.keys()) - tokens
    assert {key: written[key] for key in kept} == {key: config[key] for key in kept}
    # What follows from the others, and what is heeded only when a model is made.
    assert config.keys() - written.keys() == {
        "initializer_range",
        "intermediate_size",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "time_step_floor",
        "time_step_init_scheme",
        "time_step_max",
        "time_step_min",
        "time_step_scale",
        "transformers_version",
        "use_associative_scan",
        "use_cache",
        "use_mambapy",
    }
    assert eqx.tree_equal(load_hf(tmp_path / "again", scan=scan), model)


def test_what_was_made_here(tmp_path):
    options = {"d_state": 3, "expand": 1, "dtype": jnp.bfloat16}
    model = filled(mamba_language_model, 11, 4, 2, **options, seed=0, size=0.4)
    save_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # A_log, D and the bias of step sizes are float32.
    assert config["dtype"] == "float32"
    assert eqx.tree_equal(load_hf(tmp_path), model)
    # What else a checkpoint of transformers has may be given with it.
    save_hf(model, tmp_path, config={"time_step_max": 0.2, "residual_in_fp32": True})
    assert json.loads((tmp_path / "config.json").read_text())["time_step_max"] == 0.2


def test_dtypes_are_those_of_the_layer(tmp_path):
    write(tmp_path, MAMBA_CONFIG, mamba_shapes(MAMBA_CONFIG))
    model: Any = load_hf(tmp_path, dtype=jnp.bfloat16)
    mixer = model.stack.blocks[0].mixer
    wide = {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype}
    assert wide == {jnp.dtype("float32")}
    assert mixer.in_proj.weight.dtype == mixer.dt_proj.weight.dtype == jnp.bfloat16
    assert model.norm.weight.dtype == model.embedding.weight.dtype == jnp.bfloat16
    write(tmp_path, MAMBA_CONFIG, mamba_shapes(MAMBA_CONFIG), np.float16)
    arrays = jax.tree.leaves(eqx.filter(load_hf(tmp_path), eqx.is_array))
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float16")}


# Entries of config.json, `...` for one that is absent, and what they make of the model.
ENTRIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"hidden_act": "swish"}, {"activation": "silu"}),
    ({"hidden_act": ..., "layer_norm_epsilon": ..., "residual_in_fp32": ...}, {}),
    ({"architectures": ..., "time_step_rank": "auto"}, {"dt_rank": 1}),
    ({"time_step_rank": ..., "use_conv_bias": ..., "use_bias": None}, {"dt_rank": 1}),
    ({"intermediate_size": ..., "expand": ...}, {"d_inner": 8}),
    ({"intermediate_size": 8, "expand": 5}, {"d_inner": 8}),
    ({"ssm_cfg": {}, "d_model": 4, "pad_vocab_size_multiple": 8}, {"d_state": 3}),
]


@pytest.mark.parametrize(("entries", "made"), ENTRIES, ids=str)
def test_entries_of_config_json(entries, made, tmp_path):
    config = MAMBA_CONFIG | entries
    config = {name: value for name, value in config.items() if value is not ...}
    write(tmp_path, config, mamba_shapes(MAMBA_CONFIG))
    model: Any = load_hf(tmp_path)
    mixer = model.stack.blocks[1].mixer
    own = {"activation": mixer.conv.activation, "d_inner": mixer.d_inner}
    own |= {"dt_rank": mixer.dt_rank, "d_state": mixer.d_state}
    assert {name: own[name] for name in made} == made
