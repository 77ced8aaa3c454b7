import math
from collections.abc import Mapping
from typing import Any

from ._architecture import Architecture
from ._config_entries import Entries, encode_number
from ._hf_names import MAMBA
from ._mamba2_spec import Mamba2Spec
from ._mamba_spec import MambaSpec
from ._structure import BlockSpec, Structure


# Of config.json, and of the layers here.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
_NO_LIMIT = (0.0, math.inf)


def _read_mamba(config: Entries) -> Structure:
    d_model = config.size("hidden_size")
    # Beside it transformers does not look at `expand`.
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


def _read_mamba2(config: Entries) -> Structure:
    d_model = config.size("hidden_size")
    expand = config.size("expand", 2)
    n_heads, head_dim = config.size("num_heads", 128), config.size("head_dim", 64)
    if n_heads * head_dim != expand * d_model:
        config.refuse(
            f"`num_heads` {n_heads} times `head_dim` {head_dim} must be `expand` "
            f"{expand} times `hidden_size` {d_model}"
        )
    if not config.flag("rms_norm", True):
        config.refuse("`rms_norm` false is not supported: a norm follows the gate")
    block = Mamba2Spec(
        d_state=config.size("state_size", 128),
        d_conv=config.size("conv_kernel", 4),
        expand=expand,
        head_dim=head_dim,
        n_groups=config.size("n_groups", 8),
        dt_limit=config.interval("time_step_limit", _NO_LIMIT),
        # Older config.json say true, which transformers does not heed.
        norm_before_gate=False,
        bias=config.flag("use_bias", False),
        conv_bias=config.flag("use_conv_bias", True),
        activation=_activation(config),
    )
    return _structure(config, block, d_model, tied=False)


def _rank(config: Entries, auto: int) -> int:
    if config.get("time_step_rank") == "auto":
        return auto
    return config.size("time_step_rank", auto)


def _activation(config: Entries) -> str:
    """That of the convolution; the gate is silu in transformers 5 whatever it says."""
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


def _write_mamba(structure: Structure) -> dict[str, Any]:
    block: Any = structure.blocks[0]
    return {
        "state_size": block.d_state,
        "time_step_rank": block.dt_rank,
        **_common(structure),
    }


def _write_mamba2(structure: Structure) -> dict[str, Any]:
    block: Any = structure.blocks[0]
    # An absent entry is no limit to every version of transformers; infinity is written
    # in another way by some.
    limit = {"time_step_limit": [encode_number(x) for x in block.dt_limit]}
    return {
        "state_size": block.d_state,
        "num_heads": structure.d_model * block.expand // block.head_dim,
        "head_dim": block.head_dim,
        "n_groups": block.n_groups,
        **({} if block.dt_limit == _NO_LIMIT else limit),
        **_common(structure),
    }


def _mamba2_lacking(structure: Structure) -> list[str]:
    block: Any = structure.blocks[0]
    if block.norm_before_gate:
        return ["it norms before the gate (`norm_before_gate`)"]
    return []


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
    "MambaForCausalLM": Architecture(
        "mamba", MambaSpec, _read_mamba, _write_mamba, MAMBA
    ),
    "Mamba2ForCausalLM": Architecture(
        "mamba2", Mamba2Spec, _read_mamba2, _write_mamba2, MAMBA, _mamba2_lacking
    ),
}
