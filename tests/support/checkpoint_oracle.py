"""Checkpoints of Mamba by the names on disk: random ones, and their logits in NumPy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from support import numpy_oracles as oracles
from support.mamba_oracle import mamba_row
from support.numpy_oracles import Array, wide


# As `MambaConfig(...).to_json_string()` has it; sizes for a test.
MAMBA_CONFIG: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": 3,
    "dtype": "float32",
    "eos_token_id": 0,
    "expand": 2,
    "hidden_act": "silu",
    "hidden_size": 4,
    "initializer_range": 0.1,
    "intermediate_size": 8,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "state_size": 3,
    "tie_word_embeddings": True,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 1,
    "time_step_scale": 1.0,
    "transformers_version": "5.24.0",
    "use_associative_scan": True,
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mambapy": False,
    "vocab_size": 11,
}


def mamba_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers writes for a config."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    states, rank = config["state_size"], config["time_step_rank"]
    layer = {
        "norm.weight": (width,),
        "mixer.in_proj.weight": (2 * inner, width),
        "mixer.conv1d.weight": (inner, 1, config["conv_kernel"]),
        "mixer.x_proj.weight": (rank + 2 * states, inner),
        "mixer.dt_proj.weight": (inner, rank),
        "mixer.dt_proj.bias": (inner,),
        "mixer.A_log": (inner, states),
        "mixer.D": (inner,),
        "mixer.out_proj.weight": (width, inner),
    }
    if config["use_bias"]:
        layer |= {"mixer.in_proj.bias": (2 * inner,), "mixer.out_proj.bias": (width,)}
    if config["use_conv_bias"]:
        layer["mixer.conv1d.bias"] = (inner,)
    return whole_shapes(config, layer)


def whole_shapes(
    config: Mapping[str, Any], layer: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Those of every layer, of the embedding, the last norm and a head of its own."""
    table = (config["vocab_size"], config["hidden_size"])
    shapes = {
        f"backbone.layers.{i}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes |= {
        "backbone.embeddings.weight": table,
        "backbone.norm_f.weight": (config["hidden_size"],),
    }
    return (
        shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": table}
    )


def write(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any = np.float32,
) -> dict[str, Array]:
    """A checkpoint with random numbers, those of norms and biases too."""
    rng = np.random.default_rng(7)
    tensors = {
        name: (0.4 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in shapes.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def mamba_logits(
    config: Mapping[str, Any], tensors: Mapping[str, Array], tokens: Array
) -> Array:
    """Logits `(seq, vocab)` of one document."""

    def mixed(parameters: Mapping[str, Array], x: Array) -> Array:
        return mamba_row(parameters, x, activation=config["hidden_act"])[0]

    return residual_logits(config, tensors, tokens, mixed)


def residual_logits(config, tensors, tokens: Array, mixed) -> Array:
    """Logits of residual blocks; `mixed` is given the tensors of a mixer by name."""
    eps = config["layer_norm_epsilon"]
    table = wide(tensors["backbone.embeddings.weight"])
    x = table[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"backbone.layers.{i}."
        prefix = f"{layer}mixer."
        parameters = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        normed = oracles.rms_norm(x, wide(tensors[f"{layer}norm.weight"]), eps)
        x = x + mixed(parameters, normed)
    x = oracles.rms_norm(x, wide(tensors["backbone.norm_f.weight"]), eps)
    return x @ wide(tensors.get("lm_head.weight", table)).T
