"""Checkpoints of BitNet by the names on disk, and their logits in NumPy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from support.bitnet_oracle import rounded_token, ternary
from support.numpy_oracles import Array, rms_norm, wide


# As microsoft/bitnet-b1.58-2B-4T has it; sizes for a test. Six rows are no whole bytes.
CONFIG: dict[str, Any] = {
    "architectures": ["BitNetForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu2",
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 6,
    "max_position_embeddings": 4096,
    "model_type": "bitnet",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 11,
}
# How weights are kept: their entries in config.json.
KINDS: dict[str, dict[str, Any]] = {
    "float": {},
    "divides": {"quant_method": "bitnet"},
    "multiplies": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    "plain": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    },
    "online": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    },
}


class Written(NamedTuple):
    """What a checkpoint holds, and the matrices that its model computes with."""

    tensors: dict[str, Array]
    dense: dict[str, Array]
    codes: dict[str, Array]


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float tensors."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.attn_sub_norm.weight": (width,),
        "mlp.ffn_sub_norm.weight": (inner,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (narrow, width),
        "self_attn.v_proj.weight": (narrow, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    shapes = {
        f"model.layers.{i}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    table = (config["vocab_size"], width)
    return shapes | {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}


def packed(codes: Array) -> Array:
    """Byte `r` holds the rows `r`, `r + n`, ... of a column, one value at a time."""
    rows, columns = codes.shape
    count = -(-rows // 4)
    out = np.zeros((count, columns), np.uint8)
    for r in range(rows):
        for c in range(columns):
            out[r % count, c] |= int(codes[r, c] + 1) << 2 * (r // count)
    return out


def write(folder: Path, kind: str, dtype: Any = np.float32) -> Written:
    """A checkpoint with random numbers, those of norms too."""
    rng = np.random.default_rng(7)
    tensors, dense, all_codes = {}, {}, {}
    for name, shape in shapes_of(CONFIG).items():
        value = (float("norm" in name) + 0.4 * rng.standard_normal(shape)).astype(dtype)
        tensors[name] = value
        dense[name] = wide(value)
        if "_proj" not in name or kind == "float":
            continue
        codes, gamma = ternary(wide(value))
        if kind != "online":
            stored = 1 / gamma if kind == "divides" else gamma
            scale = np.array([stored], dtype)
            gamma = 1 / wide(scale)[0] if kind == "divides" else wide(scale)[0]
            tensors[f"{name}_scale"] = scale
            plain = kind == "plain"
            tensors[name] = codes.astype(dtype) if plain else packed(codes)
        all_codes[name], dense[name] = codes, gamma * codes
    entries = {"quantization_config": KINDS[kind]} if KINDS[kind] else {}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **entries}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Written(tensors, dense, all_codes)


def logits_of(written: Written, tokens: Array) -> Array:
    """Logits `(seq, vocab)` of one document."""
    dense, eps = written.dense, CONFIG["rms_norm_eps"]

    def product(name: str, x: Array) -> Array:
        if name in written.codes:
            x = np.array([rounded_token(token) for token in x])
        return x @ dense[name].T

    table = dense["model.embed_tokens.weight"]
    x = table[tokens]
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        attention, fed = f"{at}self_attn.", f"{at}mlp."
        seen = rms_norm(x, dense[f"{at}input_layernorm.weight"], eps)
        q, k, v = (product(f"{attention}{m}_proj.weight", seen) for m in "qkv")
        y = rms_norm(attended(q, k, v), dense[f"{attention}attn_sub_norm.weight"], eps)
        x = x + product(f"{attention}o_proj.weight", y)
        seen = rms_norm(x, dense[f"{at}post_attention_layernorm.weight"], eps)
        gate = np.maximum(product(f"{fed}gate_proj.weight", seen), 0) ** 2
        y = gate * product(f"{fed}up_proj.weight", seen)
        y = rms_norm(y, dense[f"{fed}ffn_sub_norm.weight"], eps)
        x = x + product(f"{fed}down_proj.weight", y)
    return rms_norm(x, dense["model.norm.weight"], eps) @ table.T


def attended(q: Array, k: Array, v: Array) -> Array:
    """Causal attention with rotary positions, head by head."""
    size = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    shared = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
    out = np.zeros_like(q)
    for head in range(CONFIG["num_attention_heads"]):
        own = slice(head * size, (head + 1) * size)
        theirs = slice(head // shared * size, (head // shared + 1) * size)
        turned_q, turned_k = turned(q[:, own]), turned(k[:, theirs])
        for t in range(len(q)):
            scores = turned_k[: t + 1] @ turned_q[t] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[t, own] = weights @ v[: t + 1, theirs] / weights.sum()
    return out


def turned(x: Array) -> Array:
    """The pair of channels `j` and `j + half` of token `t` turned by an angle."""
    half = x.shape[-1] // 2
    out = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(half):
            angle = t * CONFIG["rope_theta"] ** (-j / half)
            low, high = x[t, j], x[t, j + half]
            out[t, j] = low * np.cos(angle) - high * np.sin(angle)
            out[t, j + half] = high * np.cos(angle) + low * np.sin(angle)
    return out
