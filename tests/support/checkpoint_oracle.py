"""Checkpoints of both Mambas by the names on disk, and their logits in NumPy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from support import numpy_oracles as oracles
from support.mamba2_oracle import Settings, mamba2_row
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


MAMBA2_CONFIG: dict[str, Any] = {
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 3,
    "dtype": "float32",
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 4,
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 1,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "state_size": 3,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 1,
    "transformers_version": "5.24.0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 11,
}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers writes for a config."""
    width, states = config["hidden_size"], config["state_size"]
    if config["model_type"] == "mamba":
        inner, rank = config["intermediate_size"], config["time_step_rank"]
        channels, projected = inner, 2 * inner
        layer = {
            "mixer.x_proj.weight": (rank + 2 * states, inner),
            "mixer.dt_proj.weight": (inner, rank),
            "mixer.dt_proj.bias": (inner,),
            "mixer.A_log": (inner, states),
            "mixer.D": (inner,),
        }
    else:
        heads = config["num_heads"]
        inner = heads * config["head_dim"]
        channels = inner + 2 * config["n_groups"] * states
        projected = inner + channels + heads
        layer = {f"mixer.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
        layer["mixer.norm.weight"] = (inner,)
    layer |= {
        "norm.weight": (width,),
        "mixer.in_proj.weight": (projected, width),
        "mixer.conv1d.weight": (channels, 1, config["conv_kernel"]),
        "mixer.out_proj.weight": (width, inner),
    }
    if config["use_bias"]:
        layer |= {"mixer.in_proj.bias": (projected,), "mixer.out_proj.bias": (width,)}
    if config["use_conv_bias"]:
        layer["mixer.conv1d.bias"] = (channels,)
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
    folder: Path, config: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, Array]:
    """A checkpoint with random numbers, those of norms and biases too."""
    rng = np.random.default_rng(7)
    tensors = {
        name: (0.4 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in shapes_of(config).items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def logits_of(
    config: Mapping[str, Any], tensors: Mapping[str, Array], tokens: Array
) -> Array:
    """Logits `(seq, vocab)` of one document, by residual blocks."""
    eps = config["layer_norm_epsilon"]
    table = wide(tensors["backbone.embeddings.weight"])
    x = table[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"backbone.layers.{i}."
        prefix = f"{layer}mixer."
        mixer = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        normed = oracles.rms_norm(x, tensors[f"{layer}norm.weight"], eps)
        if config["model_type"] == "mamba":
            x = x + mamba_row(mixer, normed, activation=config["hidden_act"])[0]
        else:
            x = x + mamba2_row(mixer, normed, _settings(config))[0]
    x = oracles.rms_norm(x, tensors["backbone.norm_f.weight"], eps)
    return x @ wide(tensors.get("lm_head.weight", table)).T


def _settings(config: Mapping[str, Any]) -> Settings:
    low, high = config["time_step_limit"]
    return Settings(
        n_groups=config["n_groups"],
        norm_before_gate=False,
        norm_eps=config["layer_norm_epsilon"],
        dt_limit=(low, np.inf if isinstance(high, dict) else high),
        activation=config["hidden_act"],
    )
