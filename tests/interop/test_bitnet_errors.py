"""Checkpoints of BitNet that are damaged or that say what is not supported."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.bitnet_checkpoint import CONFIG, KINDS, write
from support.messages import refused

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.models import transformer_language_model


pytestmark = pytest.mark.errors
FILE = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def loaded(folder: Path, **options: Any) -> Any:
    return load_hf(folder, **options)


def change(folder, **tensors: Any) -> None:
    """Tensors replaced by what a function makes of them, or removed by `None`."""
    found = load_file(folder / FILE)
    for name, make in tensors.items():
        if make is None:
            del found[name]
        else:
            found[name] = make(found[name])
    save_file(found, folder / FILE)


def code_3(packed):
    """The third row of the bytes' second column."""
    packed[0, 1] |= 3 << 4
    return packed


# What is done to the tensors of a packed checkpoint, what the message says.
DAMAGE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a code that stands for none": (
        {QUERY: code_3},
        [f"{QUERY} in {FILE}", "damaged", "code 3", "again"],
    ),
    "scales": (
        {
            f"{QUERY}_scale": lambda x: x * 0,
            f"{GATE}_scale": lambda x: x * np.float32("nan"),
        },
        ["2 problems", f"{QUERY}_scale in {FILE}", "got 0.0", f"{GATE}_scale", "nan"],
    ),
    "a negative scale": (
        {f"{QUERY}_scale": lambda x: -x},
        [f"{QUERY}_scale in {FILE} must be positive and finite, got -"],
    ),
    "an infinite scale": (
        {f"{QUERY}_scale": lambda x: x / np.float32(0)},
        [f"{QUERY}_scale", "positive and finite, got inf"],
    ),
    "everything at once": (
        {QUERY: code_3, f"{GATE}_scale": lambda x: -x},
        ["2 problems", QUERY, f"{GATE}_scale"],
    ),
    "a shape": (
        {QUERY: lambda x: x[:1]},
        [f"{QUERY} must have shape (2, 8), got (1, 8)"],
    ),
    "the shape of a scale": (
        {f"{QUERY}_scale": lambda x: np.repeat(x, 8)},
        [f"{QUERY}_scale must have shape (1,), got (8,)"],
    ),
    "no scale": ({f"{GATE}_scale": None}, [f"missing: {GATE}_scale"]),
    "another dtype": (
        {QUERY: lambda x: x.astype(np.int16)},
        [QUERY, "I16"],
    ),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("kind", ["divides", "multiplies"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name, kind, tmp_path):
    write(tmp_path, kind)
    tensors, words = DAMAGE[name]
    change(tmp_path, **tensors)
    with refused("load_hf", str(tmp_path), *words):
        loaded(tmp_path)


def test_what_fills_the_last_bytes_up_is_not_read(tmp_path):
    """Six rows are two bytes of four: the places of two rows are free."""
    write(tmp_path, "divides")
    before = loaded(tmp_path).stack.blocks[0].feed_forward.gate_proj.weight
    change(tmp_path, **{GATE: lambda x: x | (3 << 6)})
    after = loaded(tmp_path).stack.blocks[0].feed_forward.gate_proj.weight
    np.testing.assert_array_equal(after.ternary, before.ternary)
    # The sixth row lies under them.
    change(tmp_path, **{GATE: lambda x: x | (3 << 4)})
    with refused(f"{GATE} in {FILE}", "code 3"):
        loaded(tmp_path)


def test_floats_where_bytes_belong(tmp_path):
    tensors = write(tmp_path, "plain").tensors
    config = {**CONFIG, "quantization_config": KINDS["divides"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(f"{QUERY} must be packed in bytes", "U8", "F32", "(2, 8), got (8, 8)"):
        loaded(tmp_path)
    config = {**CONFIG, "quantization_config": KINDS["multiplies"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded(tmp_path)
    for make in (lambda x: x + 0.1 * (x == 1), lambda x: x * np.float32("nan")):
        save_file(tensors, tmp_path / FILE)
        change(tmp_path, **{QUERY: lambda x, make=make: make(x).astype("float32")})
        with refused(f"{QUERY} in {FILE}", "-1, 0 and 1", "'online'"):
            loaded(tmp_path)


# Entries of quantization_config, what the message says.
ENTRIES: list[tuple[Any, list[str]]] = [
    ({"quant_method": "gptq", "bits": 4}, ["another way than BitNet's", "Dequantize"]),
    ([1], ["`quantization_config` must be an object"]),
    ({"linear_class": "bitlinaer"}, ["`linear_class`", "'bitlinaer'"]),
    ({"quantization_mode": "on"}, ["`quantization_mode`", "'on'"]),
    ({"use_rms_norm": True}, ["`use_rms_norm` true"]),
    ({"use_rms_norm": 1}, ["`use_rms_norm` must be true or false"]),
    ({"modules_to_not_convert": []}, ["`modules_to_not_convert` []", "lm_head"]),
    ({"modules_to_not_convert": ["lm_head", "q_proj"]}, ["'q_proj'"]),
]


@pytest.mark.parametrize(("entries", "words"), ENTRIES, ids=str)
def test_entries_of_the_quantization(entries, words, tmp_path):
    write(tmp_path, "divides")
    if isinstance(entries, dict):
        entries = {"quant_method": "bitnet"} | entries
    config = {**CONFIG, "quantization_config": entries}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("config.json", "quantization_config", *words):
        loaded(tmp_path)


# Entries of config.json, what the message says.
ARCHITECTURE: list[tuple[dict[str, Any], list[str]]] = [
    ({"hidden_act": "silu"}, ["`hidden_act` 'silu'", "gated by 'relu2'"]),
    ({"attention_bias": True}, ["`attention_bias` true", "no biases"]),
    ({"head_dim": 6}, ["`head_dim` 6 times 2 heads must be `hidden_size` 8"]),
    ({"architectures": ["BitnetForCausalLM"]}, ["mean 'BitNetForCausalLM'"]),
    (
        {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
        ["no place for: ", "attn_sub_norm"],
    ),
    (
        {"architectures": ["MistralForCausalLM"], "hidden_act": "silu"},
        ["quantized", "Dequantize"],
    ),
]


@pytest.mark.parametrize(("entries", "words"), ARCHITECTURE, ids=str)
def test_entries_of_the_architecture(entries, words, tmp_path):
    write(tmp_path, "divides")
    config = {**CONFIG, "quantization_config": KINDS["divides"]} | entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(str(tmp_path), *words):
        loaded(tmp_path)


def test_ternary_models_are_not_written(tmp_path):
    write(tmp_path, "multiplies")
    ternary = loaded(tmp_path)
    with refused("save_hf", "q_proj.weight.codes", "dequantize"):
        save_hf(ternary, tmp_path / "again")
    write(tmp_path, "float")
    plain = loaded(tmp_path)
    quantization = {"quantization_config": KINDS["divides"]}
    with refused("save_hf", "`quantization_config`", "floats", "Leave the entry out"):
        save_hf(plain, tmp_path / "again", config=quantization)
    with refused("as LlamaForCausalLM", "'relu2glu', not 'swiglu'", "norms in front"):
        save_hf(plain, tmp_path / "again", architecture="LlamaForCausalLM")
    llama = transformer_language_model(11, 8, 1, 2, d_ff=6, key=jax.random.key(0))
    with refused("as BitNetForCausalLM", "no norms in front", "'swiglu', not"):
        save_hf(llama, tmp_path / "again", architecture="BitNetForCausalLM")


def test_norms_in_one_place_only(tmp_path):
    """Of two maps; and maps that are none of ours."""
    write(tmp_path, "float")
    model = loaded(tmp_path)
    block = model.stack.blocks[0]
    llama: Any = transformer_language_model(11, 8, 1, 2, d_ff=6, key=jax.random.key(0))
    linear = llama.stack.blocks[0]
    half = eqx.tree_at(
        lambda m: m.stack.blocks[0].mixer.o_proj, model, linear.mixer.o_proj
    )
    with refused("block 0: its `down_proj` is BitNet158, not Linear"):
        save_hf(half, tmp_path / "again")
    other = eqx.tree_at(
        lambda m: m.stack.blocks[0].mixer.q_proj, model, block.mixer.o_proj
    )
    with refused("block 0: its `q_proj` is BitNet158, not Linear"):
        save_hf(other, tmp_path / "again")
