from collections.abc import Mapping
from typing import Any

from ._architecture import Architecture
from ._config_entries import Entries
from ._hf_names import MAMBA
from ._mamba_spec import MambaSpec
from ._structure import BlockSpec, Structure


# Of config.json, and of the layers here.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def _read(config: Entries) -> Structure:
    d_model = config.size("hidden_size")
    # Only in config.json if it was given, and then it is what counts.
    d_inner = config.size("intermediate_size", config.size("expand", 2) * d_model)
    if d_inner % d_model:
        config.refuse(
            f"`intermediate_size` {d_inner} is no multiple of `hidden_size` {d_model}"
        )
    block = MambaSpec(
        d_state=config.size("state_size", 16),
        d_conv=config.size("conv_kernel", 4),
        expand=max(1, d_inner // d_model),
        dt_rank=_rank(config, -(-d_model // 16)),
        bias=config.flag("use_bias", False),
        conv_bias=config.flag("use_conv_bias", True),
        activation=_activation(config),
    )
    return _structure(config, block, d_model, tied=True)


def _rank(config: Entries, auto: int) -> int:
    if config.get("time_step_rank") == "auto":
        return auto
    return config.size("time_step_rank", auto)


def _activation(config: Entries) -> str:
    """That of the convolution; the gate is silu in every implementation."""
    name = config.get("hidden_act")
    name = "silu" if name is None else name
    if name not in _ACTIVATIONS:
        config.refuse(
            f"`hidden_act` {name!r} is not supported, only {', '.join(_ACTIVATIONS)}"
        )
        return "silu"
    return _ACTIVATIONS[name]


def _structure(
    config: Entries, block: BlockSpec, d_model: int, *, tied: bool
) -> Structure:
    # A rounding, where parameters are narrower than float32; see the documentation.
    config.flag("residual_in_fp32", True)
    return Structure(
        vocab_size=config.size("vocab_size"),
        d_model=d_model,
        eps=config.number("layer_norm_epsilon", 1e-5, above=0),
        tie_embeddings=config.flag("tie_word_embeddings", tied),
        blocks=(block,) * config.size("num_hidden_layers"),
    )


def _write(structure: Structure) -> dict[str, Any]:
    block: Any = structure.blocks[0]
    return {
        "state_size": block.d_state,
        "time_step_rank": block.dt_rank,
        **_common(structure),
    }


def _common(structure: Structure) -> dict[str, Any]:
    block: Any = structure.blocks[0]
    return {
        "expand": block.expand,
        "conv_kernel": block.d_conv,
        "use_bias": block.bias,
        "use_conv_bias": block.conv_bias,
        "hidden_act": block.activation,
        "layer_norm_epsilon": float(structure.eps),
    }


MAMBA_ARCHITECTURES: Mapping[str, Architecture] = {
    "MambaForCausalLM": Architecture("mamba", MambaSpec, _read, _write, MAMBA),
}
