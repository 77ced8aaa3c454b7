"""Checkpoints that do not fit: one error names everything and the fix."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoint_oracle import MAMBA2_CONFIG, MAMBA_CONFIG, write
from support.messages import refused

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.models import transformer_language_model


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def model(**options: Any) -> Any:
    arguments: dict[str, Any] = {"n_kv_heads": 1, "d_ff": 6} | options
    return transformer_language_model(11, 8, 2, 2, **arguments, key=KEY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound checkpoint of Llama."""
    save_hf(model(), tmp_path)
    load_hf(tmp_path)
    return tmp_path


def change(folder: Path, **entries: Any) -> None:
    """Entries of config.json replaced, or removed by `...`."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))


def test_a_path_that_is_no_folder(folder):
    with refused("`path`", "local folder", "not there", "hf download"):
        load_hf(folder / "absent")
    with refused("`path`", "a file"):
        load_hf(folder / WEIGHTS)


def test_a_dtype_that_is_not_floating(folder):
    with refused("`dtype`", "floating", "int32"):
        load_hf(folder, dtype=jnp.int32)


def test_files_that_are_missing(folder):
    (folder / "config.json").unlink()
    with refused(str(folder), "config.json is missing"):
        load_hf(folder)
    (folder / WEIGHTS).unlink()
    with refused("2 problems", "config.json is missing", "neither", "complete?"):
        load_hf(folder)


def test_weights_of_another_format(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with refused("pytorch_model.bin", "Convert", "save_pretrained"):
        load_hf(folder)


def test_shards_without_an_index(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    with refused("model-00001-of-00002.safetensors", f"copy {INDEX}"):
        load_hf(folder)


def test_an_index_that_does_not_fit(folder):
    save_hf(model(), folder, max_shard_size=2000)
    first = next(folder.glob("model-00001*"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = first.name
    (folder / INDEX).write_text(json.dumps(index))
    with refused("not in their files", "model.extra.weight"):
        load_hf(folder)
    first.unlink()
    with refused(INDEX, "not there", first.name):
        load_hf(folder)
    (folder / INDEX).write_text('{"weight_map": 3}')
    with refused("weight_map"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ', ["no JSON", "line 1"]),
        ("[1]", ["object", "list"]),
        (b"\xff", ["utf"]),
    ],
)
def test_files_that_are_no_json(name, text, words, folder):
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    with refused(name, *words):
        load_hf(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -3])
def test_a_truncated_file(kept, folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    change(folder, hidden_act="gelu")
    with refused("2 problems", WEIGHTS, "complete safetensors", "again", "'gelu'"):
        load_hf(folder)


def test_tensors_that_do_not_fit(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(9, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(8, np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((11, 8), np.int8)
    save_file(tensors, folder / WEIGHTS)
    with refused(
        "4 problems",
        "missing: model.layers.1.mlp.up_proj.weight",
        "no place for: model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight must have shape (8,), got (9,)",
        "I8",
        "quantized",
    ):
        load_hf(folder)


def test_a_head_that_is_not_there(folder):
    tensors = load_file(folder / WEIGHTS)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / WEIGHTS)
    with refused("missing: lm_head.weight", "`tie_word_embeddings` true"):
        load_hf(folder)
    save_file(tensors | {"lm_head.weight": head}, folder / WEIGHTS)
    change(folder, tie_word_embeddings=True)
    with refused("lm_head.weight is not model.embed_tokens.weight", "false"):
        load_hf(folder)


def test_dtypes_that_need_a_decision(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float16)}, folder / WEIGHTS)
    load_hf(folder)
    with refused("stack.blocks.feed_forward.up_proj.weight (F16, F32)", "Pass `dtype`"):
        load_hf(folder, scan=True)
    assert load_hf(folder, scan=True, dtype=jnp.float32).stack.num_blocks == 2
    save_file(tensors | {name: tensors[name].astype(np.float64)}, folder / WEIGHTS)
    with refused("float64", name, "jax_enable_x64"):
        load_hf(folder)


ROPE = "rope_parameters"
# Entries of config.json, what the message says.
ENTRIES: list[tuple[dict[str, Any], list[str]]] = [
    ({"architectures": ["Llama2ForCausalLM"]}, ["Llama2For", "mean 'LlamaForCausal"]),
    ({"architectures": ["Qwen2MoeForCausalLM"]}, ["mean 'Qwen2ForCausalLM'"]),
    (
        {"architectures": None, "model_type": "mixtrall"},
        ["`architectures` is missing", "'mixtrall'", "mean 'mixtral'"],
    ),
    ({"hidden_size": ...}, ["`hidden_size` is missing"]),
    ({"vocab_size": "11"}, ["`vocab_size` must be a positive integer", "'11'"]),
    ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "positive", "0"]),
    ({"num_attention_heads": True}, ["`num_attention_heads`", "True"]),
    ({"num_key_value_heads": 3}, ["`n_kv_heads` must divide"]),
    ({"head_dim": 3}, ["`head_dim` must be even", "3"]),
    ({"rms_norm_eps": 0}, ["`rms_norm_eps` must be a number above 0", "got 0"]),
    ({"rms_norm_eps": float("nan")}, ["`rms_norm_eps`", "nan"]),
    ({"tie_word_embeddings": 1}, ["`tie_word_embeddings` must be true or false"]),
    ({"attention_dropout": 2.0}, ["`dropout_p`", "2.0"]),
    ({"hidden_act": "gelu"}, ["`hidden_act`", "'gelu'", "'silu'"]),
    ({"quantization_config": {"bits": 4}}, ["`quantization_config`", "Dequantize"]),
    ({"partial_rotary_factor": 0.5}, ["`partial_rotary_factor` 0.5", "must be 1"]),
    ({ROPE: [1]}, [f"`{ROPE}` must be an object", "[1]"]),
    ({ROPE: {"partial_rotary_factor": 0.5}}, [f"`{ROPE}`", "must be 1"]),
    ({ROPE: {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear", "yarn"]),
    ({"rope_scaling": {"type": "longrope"}}, ["`rope_scaling`", "'longrope'"]),
    ({ROPE: {"rope_type": "linear"}}, [f"`{ROPE}`", "`factor` is missing"]),
    ({ROPE: {"rope_type": "linear", "factor": -1}}, ["`factor`", "above 0", "-1"]),
    (
        {ROPE: {"rope_type": "llama3", "factor": 8.0}},
        [
            "`low_freq_factor` is missing",
            "`high_freq_factor` is missing",
            "`original_max_position_embeddings` is missing",
        ],
    ),
    (
        {
            ROPE: {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 32,
            }
        },
        ["`high_freq_factor` must be above"],
    ),
    (
        {
            ROPE: {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 5,
                "truncate": False,
            }
        },
        ["`truncate`", "ramp is empty"],
    ),
]


@pytest.mark.parametrize(("entries", "words"), ENTRIES, ids=str)
def test_entries_of_config_json(entries, words, folder):
    change(folder, **entries)
    with refused("config.json", *words):
        load_hf(folder)


# Entries of a Qwen2 model's config.json, what the message says.
WINDOWS: list[tuple[dict[str, Any], list[str]]] = [
    ({"layer_types": ["full_attention"]}, ["`layer_types` must have 2", "['full"]),
    (
        {"layer_types": ["full_attention", "chunked_attention"]},
        ["`layer_types` may hold", "['chunked_attention']"],
    ),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        ["`use_sliding_window` must be true"],
    ),
]


@pytest.mark.parametrize(("entries", "words"), WINDOWS, ids=str)
def test_windows_by_layer(entries, words, folder):
    save_hf(model(use_bias=True, use_out_bias=False), folder)
    change(folder, **entries)
    with refused("config.json", *words):
        load_hf(folder)


def test_windows_that_cannot_be_scanned(folder):
    windowed, whole = model(qk_norm=True, window=3), model(qk_norm=True)
    mixed = eqx.tree_at(lambda m: m.stack.blocks[1], whole, windowed.stack.blocks[1])
    save_hf(mixed, folder)
    with refused("config.json", "window", "scan=False"):
        load_hf(folder, scan=True)


def test_layer_types_that_are_not_heeded(folder):
    save_hf(model(window=3), folder)
    change(folder, layer_types=["sliding_attention", "full_attention"])
    with refused("`layer_types`", "mistral"):
        load_hf(folder)


# Entries of a Mamba model's config.json, what the message says.
MAMBA_ENTRIES: list[tuple[dict[str, Any], list[str]]] = [
    ({"architectures": ["FalconMambaForCausalLM"]}, ["mean 'MambaForCausalLM'"]),
    (
        {"architectures": None, "model_type": None, "ssm_cfg": {}},
        ["`ssm_cfg`", "mamba_ssm", "-hf"],
    ),
    ({"state_size": 0}, ["`state_size` must be a positive integer", "0"]),
    ({"intermediate_size": 9}, ["`intermediate_size` 9", "multiple", "4"]),
    ({"intermediate_size": ..., "expand": 1.5}, ["`expand`", "positive integer, got"]),
    ({"time_step_rank": "full"}, ["`time_step_rank`", "'full'"]),
    ({"hidden_act": "gelu_new"}, ["`hidden_act` 'gelu_new'", "silu, swish, gelu"]),
    ({"use_bias": "no"}, ["`use_bias` must be true or false, got 'no'"]),
    ({"use_conv_bias": 1}, ["`use_conv_bias` must be true or false"]),
    ({"residual_in_fp32": 32}, ["`residual_in_fp32` must be true or false"]),
    ({"layer_norm_epsilon": 0.0}, ["`layer_norm_epsilon`", "above 0"]),
    ({"conv_kernel": None, "num_hidden_layers": ...}, ["`num_hidden_layers` is miss"]),
    ({"quantization_config": {"bits": 4}}, ["`quantization_config`", "Dequantize"]),
    # What does not fit the tensors.
    ({"use_bias": True}, ["missing: backbone.layers.0.mixer.in_proj.bias"]),
    ({"use_conv_bias": False}, ["no place for: backbone.layers.0.mixer.conv1d.bias"]),
    ({"conv_kernel": 4}, ["mixer.conv1d.weight must have shape (8, 1, 4), got (8, 1"]),
    ({"time_step_rank": 2}, ["mixer.x_proj.weight must have shape (8, 8), got (7, 8)"]),
    ({"vocab_size": 10}, ["backbone.embeddings.weight", "(10, 4), got (11, 4)"]),
    ({"tie_word_embeddings": False}, ["missing: lm_head.weight"]),
]


# The same of a Mamba-2 model.
MAMBA2_ENTRIES: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_heads": 3}, ["`num_heads` 3 times `head_dim` 4", "`expand` 2 times", " 4"]),
    ({"head_dim": ...}, ["`head_dim` 64"]),
    ({"n_groups": 3}, ["`n_groups` must divide the 2 heads", "got 3"]),
    ({"rms_norm": False}, ["`rms_norm` false"]),
    ({"time_step_limit": 3}, ["`time_step_limit` must be two ascending numbers", "3"]),
    ({"time_step_limit": [1.0, 0.5]}, ["`time_step_limit`", "[1.0, 0.5]"]),
    ({"time_step_limit": [None, 1.0]}, ["`time_step_limit`", "[None, 1.0]"]),
    ({"time_step_limit": [-1.0, 1.0]}, ["`dt_limit`", "-1.0"]),
    # What does not fit the tensors: all inner channels are convolved, B and C too.
    ({"n_groups": 2}, ["conv1d.weight must have shape (20, 1, 3), got (14, 1, 3)"]),
    ({"state_size": 4}, ["mixer.in_proj.weight must have shape (26, 4), got (24, 4)"]),
    ({"num_heads": 4, "head_dim": 2}, ["mixer.dt_bias must have shape (4,), got (2,"]),
    ({"architectures": ["MambaForCausalLM"]}, ["missing: ", "mixer.x_proj.weight"]),
    ({"tie_word_embeddings": True}, ["lm_head.weight is not backbone.embeddings"]),
]


@pytest.mark.parametrize(
    ("config", "entries", "words"),
    [(MAMBA_CONFIG, *case) for case in MAMBA_ENTRIES]
    + [(MAMBA2_CONFIG, *case) for case in MAMBA2_ENTRIES],
    ids=lambda value: (
        str(dict(value).get("model_type", value)) if isinstance(value, dict) else ""
    ),
)
def test_mambas_that_do_not_fit(config, entries, words, tmp_path):
    write(tmp_path, config)
    change(tmp_path, **entries)
    with refused(str(tmp_path), *words):
        load_hf(tmp_path)


def test_names_of_the_package_mamba_ssm(tmp_path):
    """Its tensors under a config.json of transformers."""
    tensors = write(tmp_path, MAMBA_CONFIG)
    table = tensors.pop("backbone.embeddings.weight")
    save_file(tensors | {"backbone.embedding.weight": table}, tmp_path / WEIGHTS)
    with refused(
        "missing: backbone.embeddings.weight", "no place for: backbone.embedding.weight"
    ):
        load_hf(tmp_path)
