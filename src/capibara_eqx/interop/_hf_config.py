from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..internal import nearest
from ._architecture import Architecture
from ._config_entries import Entries
from ._hf_llama import LLAMA_ARCHITECTURES
from ._hf_mamba import MAMBA_ARCHITECTURES
from ._structure import Structure
from ._ternary_tensors import TernaryTensors, read_ternary


# In the order in which one is chosen for a model.
ARCHITECTURES: Mapping[str, Architecture] = {
    **LLAMA_ARCHITECTURES,
    **MAMBA_ARCHITECTURES,
}


# Whose linear maps transformers may have as BitNet's; others are not tested here.
_TERNARY = ("BitNetForCausalLM", "LlamaForCausalLM")


class Config(NamedTuple):
    """A config.json as read; the structure is `None` if it has problems.

    `ternary`: how weights of -1, 0 and 1 are kept, if they are.
    """

    architecture: str | None
    structure: Structure | None
    problems: list[str]
    ternary: TernaryTensors | None = None


def read_config(entries: Mapping[str, Any]) -> Config:
    """The structure that a config.json describes, or all that is wrong with it."""
    problems: list[str] = []
    config = Entries(entries, problems, "config.json")
    name = _architecture(config)
    ternary = None
    if config.get("quantization_config") is not None:
        if name in _TERNARY:
            ternary = read_ternary(config)
        else:
            config.refuse(
                "`quantization_config`: the weights are quantized. Dequantize them "
                "with transformers and save the model again"
            )
    structure = None if name is None else ARCHITECTURES[name].read(config)
    return Config(name, None if problems else structure, problems, ternary)


def _architecture(config: Entries) -> str | None:
    named = config.get("architectures")
    if named:
        name = named[0] if isinstance(named, Sequence) else named
        if name in ARCHITECTURES:
            return name
        known = ", ".join(ARCHITECTURES)
        hint = nearest(name, ARCHITECTURES)
        config.refuse(f"the architecture {name!r} is not one of {known}.{hint}")
        return None
    model_type = config.get("model_type")
    types = {kind.model_type: name for name, kind in ARCHITECTURES.items()}
    if model_type in types:
        return types[model_type]
    if config.has("ssm_cfg"):
        config.refuse(
            "`ssm_cfg` without `architectures`: this is the format of the package "
            "mamba_ssm, whose names of entries and tensors are others. Take the "
            "checkpoint for transformers; those of state-spaces end in -hf"
        )
        return None
    config.refuse(
        "`architectures` is missing, and `model_type` must be one of "
        f"{', '.join(types)}; got {model_type!r}.{nearest(model_type, types)}"
    )
    return None


def write_config(structure: Structure, name: str) -> dict[str, Any]:
    """The entries of a config.json that says all of `structure`.

    No token id ends a text: that is not known here, and transformers would take one.
    """
    kind = ARCHITECTURES[name]
    return {
        "architectures": [name],
        "model_type": kind.model_type,
        "vocab_size": structure.vocab_size,
        "hidden_size": structure.d_model,
        "num_hidden_layers": len(structure.blocks),
        "tie_word_embeddings": structure.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **kind.write(structure),
    }
