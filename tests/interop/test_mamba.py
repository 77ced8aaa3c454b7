"""Checkpoints of both Mambas, by the names that transformers gives to what they hold.

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
from support.checkpoint_oracle import MAMBA2_CONFIG, MAMBA_CONFIG, logits_of, write
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.models import mamba2_language_model, mamba_language_model


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
ODD2 = {
    "use_bias": True,
    "use_conv_bias": False,
    "tie_word_embeddings": True,
    "expand": 3,
    "num_heads": 4,
    "head_dim": 3,
    "n_groups": 2,
    "time_step_limit": [0.4, 0.8],
    "hidden_act": "relu",
    "layer_norm_epsilon": 0.01,
}
# A config.json, scanned here.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "mamba": (MAMBA_CONFIG, True),
    "mamba-odd": (MAMBA_CONFIG | ODD, False),
    "mamba2": (MAMBA2_CONFIG, True),
    "mamba2-odd": (MAMBA2_CONFIG | ODD2, False),
}


# What follows from the others, is heeded only when a model is made, or how to compute.
NOT_WRITTEN = {
    "chunk_size",
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
# A rank, which it does not have, and limits that are none.
NOT_WRITTEN2 = {"time_step_limit", "time_step_rank"}


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
    config, scan = CASES[name]
    tensors = write(tmp_path, config)
    tokens = np.random.default_rng(3).integers(0, 11, (BATCH, LENGTH))
    expected = np.stack([logits_of(config, tensors, row) for row in tokens])
    model = load_hf(tmp_path, scan=scan)
    for way, found in every_way(model, jnp.asarray(tokens, "int32")).items():
        # Sums of up to 12 terms through two layers.
        assert_close(found, expected, dtype=np.float32, length=48, name=way)


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_again(name, tmp_path):
    config, scan = CASES[name]
    tensors = write(tmp_path, config)
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
    more = NOT_WRITTEN2 if config["model_type"] == "mamba2" else set()
    assert config.keys() - written.keys() <= NOT_WRITTEN | more
    assert eqx.tree_equal(load_hf(tmp_path / "again", scan=scan), model)


MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": (mamba_language_model, {"d_state": 3, "expand": 1}),
    "mamba2": (mamba2_language_model, {"d_state": 3, "head_dim": 2, "n_groups": 2}),
}


@pytest.mark.parametrize("name", MADE)
def test_what_was_made_here(name, tmp_path):
    make, options = MADE[name]
    options = options | {"dtype": jnp.bfloat16}
    model = filled(make, 11, 4, 2, **options, seed=0, size=0.4)
    save_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # A_log, D and the bias of step sizes are float32.
    assert config["dtype"] == "float32"
    assert eqx.tree_equal(load_hf(tmp_path), model)
    # What else a checkpoint of transformers has may be given with it.
    save_hf(model, tmp_path, config={"time_step_max": 0.2, "residual_in_fp32": True})
    assert json.loads((tmp_path / "config.json").read_text())["time_step_max"] == 0.2


@pytest.mark.parametrize("config", [MAMBA_CONFIG, MAMBA2_CONFIG], ids=["1", "2"])
def test_dtypes_are_those_of_the_layer(config, tmp_path):
    write(tmp_path, config)
    model: Any = load_hf(tmp_path, dtype=jnp.bfloat16)
    mixer = model.stack.blocks[0].mixer
    bias = mixer.dt_proj.bias if config is MAMBA_CONFIG else mixer.dt_bias
    assert {x.dtype for x in (mixer.A_log, mixer.D, bias)} == {jnp.dtype("float32")}
    narrow = [mixer.in_proj, mixer.out_proj, model.norm, model.embedding]
    assert {part.weight.dtype for part in narrow} == {jnp.dtype("bfloat16")}
    write(tmp_path, config, np.float16)
    arrays = jax.tree.leaves(eqx.filter(load_hf(tmp_path), eqx.is_array))
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float16")}


# Entries of config.json, `...` for one that is absent, and what they make of a layer.
ENTRIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"hidden_act": "swish"}, {"activation": "silu"}),
    ({"hidden_act": ..., "layer_norm_epsilon": ..., "residual_in_fp32": ...}, {}),
    ({"architectures": ..., "time_step_rank": "auto"}, {"dt_rank": 1}),
    ({"time_step_rank": ..., "use_conv_bias": ..., "use_bias": None}, {"dt_rank": 1}),
    ({"intermediate_size": ..., "expand": ...}, {"d_inner": 8}),
    ({"intermediate_size": 8, "expand": 5}, {"d_inner": 8}),
    ({"ssm_cfg": {}, "d_model": 4, "pad_vocab_size_multiple": 8}, {"d_state": 3}),
]
INFINITY = {"__float__": "Infinity"}
# As older versions of transformers wrote them.
IGNORED2 = {"norm_before_gate": True, "rms_norm": True}
ENTRIES2: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (IGNORED2, {"norm_before_gate": False}),
    ({"time_step_limit": [0, float("inf")]}, {"dt_limit": (0.0, np.inf)}),
    ({"time_step_limit": [0.25, INFINITY]}, {"dt_limit": (0.25, np.inf)}),
    ({"time_step_limit": ..., "use_conv_bias": ...}, {"dt_limit": (0.0, np.inf)}),
    ({"architectures": ..., "intermediate_size": 99}, {"d_inner": 8}),
    ({"chunk_size": 16, "time_step_rank": 5}, {"chunk_size": None}),
]


@pytest.mark.parametrize(
    ("config", "entries", "made"),
    [(MAMBA_CONFIG, *case) for case in ENTRIES]
    + [(MAMBA2_CONFIG, *case) for case in ENTRIES2],
    ids=lambda value: str(value.get("model_type", value)),
)
def test_entries_of_config_json(config, entries, made, tmp_path):
    write(tmp_path, config)
    entries = {k: v for k, v in (config | entries).items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    model: Any = load_hf(tmp_path)
    mixer = model.stack.blocks[1].mixer
    own = vars(mixer) | {"activation": mixer.conv.activation}
    if config is MAMBA2_CONFIG:
        own |= {"norm_before_gate": mixer.norm.norm_before_gate}
    assert {name: own[name] for name in made} == made


def test_limits_of_steps_on_disk(tmp_path):
    """JSON has no infinity: without a limit no entry, and else as in transformers 5."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = []
    for limit in ((0.0, np.inf), (0.25, np.inf), (0.25, 0.5)):
        options = {"d_state": 3, "head_dim": 4, "dt_limit": limit}
        model = filled(mamba2_language_model, 11, 4, 1, **options, seed=0, size=0.4)
        save_hf(model, tmp_path)
        assert eqx.tree_equal(load_hf(tmp_path), model)
        text = (tmp_path / "config.json").read_text()
        config = json.loads(text, parse_constant=refuse)
        written.append(config.get("time_step_limit"))
    assert written == [None, [0.25, {"__float__": "Infinity"}], [0.25, 0.5]]
