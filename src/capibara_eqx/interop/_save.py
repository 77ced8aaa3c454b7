import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..internal import check_choice, require_extra
from ..models import LanguageModel
from ._describe import array_leaves, describe
from ._hf_config import ARCHITECTURES, read_config, write_config
from ._hf_names import Names, tensor_names
from ._problems import refuse, some
from ._structure import Structure
from ._write_files import Piece, parse_size, write_checkpoint


_DTYPES = ("float32", "float16", "bfloat16", "float64")


def save_hf(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model as a Hugging Face checkpoint that transformers loads.

    Written are config.json and the weights as safetensors; with the tokenizer's files
    beside them, `AutoModelForCausalLM.from_pretrained(path)` and programs that read
    its format give the same logits. The dropout of blocks, which acts in training
    only, has no entry there and is left out; `NTKScaling` becomes the base that it is.

    A checkpoint in `path` is replaced, other files stay. The new one is complete before
    the old one is touched, and config.json comes last, so that an interrupted call
    leaves the old checkpoint, the new one, or a folder that no program loads.

    **Arguments:**

    - `model`: of `TransformerBlock`s with causal, rotary `Attention` and `SwiGLU` or
        `MoE`, or of `ResidualBlock`s with `Mamba` or with `Mamba2`; scanned or not.
    - `path`: the folder, made if it is not there.
    - `architecture`: such as `"LlamaForCausalLM"`; if not given, the first that has
        all that the model has: `LlamaForCausalLM`, `MistralForCausalLM` (a window),
        `Qwen2ForCausalLM` (biases of queries, keys and values), `Qwen3ForCausalLM`
        (`qk_norm`), `MixtralForCausalLM` (experts), `BitNetForCausalLM` (norms inside,
        float weights), `MambaForCausalLM`, `Mamba2ForCausalLM`.
    - `config`: further entries of config.json, such as `eos_token_id` or
        `max_position_embeddings`. They may be a whole config.json, but must not
        contradict the model.
    - `max_shard_size`: bytes of the largest file, as a number or such as `"5GB"`; one
        file if not given.

    **Raises:**

    - `ValueError`: one for all that the architecture cannot express, or that `config`
        contradicts.
    - `OSError`: if the files cannot be written.
    - `ImportError`: without the extra `interop`.

    !!! example

        ```python
        from capibara_eqx.interop import save_hf

        model = transformer_language_model(256, 64, 2, 8, n_kv_heads=2, key=key)
        save_hf(model, "checkpoint", config={"eos_token_id": 0})
        ```
    """
    require_extra("safetensors", "interop")
    if architecture is not None:
        check_choice("architecture", architecture, ARCHITECTURES)
    limit = parse_size(max_shard_size)
    structure, problems = describe(model)
    refuse("save_hf", "this model has no place in a checkpoint", problems)
    assert structure is not None  # or there was a problem
    name, problems = _choose(structure, architecture)
    refuse("save_hf", f"cannot write this model as {name}", problems)
    entries = {**write_config(structure, name), **(config or {})}
    problems = _contradictions(structure, name, entries)
    leaves = array_leaves(model)
    kinds = {path: jnp.dtype(leaf.dtype).name for path, leaf in leaves.items()}
    odd = [f"{path} ({kind})" for path, kind in kinds.items() if kind not in _DTYPES]
    if odd:
        problems.append(f"dtypes other than {', '.join(_DTYPES)}: {some(odd)}")
    refuse("save_hf", f"cannot write this model as {name}", problems)
    # That of the widest tensor: transformers converts all to it.
    dtype = max(set(kinds.values()), key=lambda kind: (jnp.dtype(kind).itemsize, kind))
    if set(kinds.values()) == {"float16", "bfloat16"}:
        dtype = "float32"  # neither holds the other
    # The newer name and the older one.
    entries |= {"dtype": dtype, "torch_dtype": dtype}
    names = ARCHITECTURES[name].names
    write_checkpoint(Path(path), entries, _pieces(names, leaves), limit)


def _choose(structure: Structure, architecture: str | None) -> tuple[str, list[str]]:
    """The first architecture that has all, or else the nearest and what it lacks."""
    own = structure.blocks[0]
    if architecture is not None:
        theirs = ARCHITECTURES[architecture].spec
        if not isinstance(own, theirs):
            return architecture, [f"its blocks are {own.kind}, not {theirs.kind}"]
    fitting = [name for name, a in ARCHITECTURES.items() if isinstance(own, a.spec)]
    names = [architecture] if architecture else fitting
    lacking = {name: _lacking(structure, name) for name in names}
    best = min(names, key=lambda name: len(lacking[name]))
    return best, lacking[best]


def _lacking(structure: Structure, name: str) -> list[str]:
    lacking = ARCHITECTURES[name].lacking
    return [] if lacking is None else lacking(structure)


def _contradictions(
    structure: Structure, name: str, entries: dict[str, Any]
) -> list[str]:
    """How config.json with the caller's entries would describe another model."""
    read = read_config(entries)
    if read.architecture not in (None, name):
        return [
            f"`config` says {read.architecture}, the model is written as {name}. Pass "
            "`architecture`, or leave the entry out"
        ]
    if read.structure is None:
        return [f"`config`: {problem}" for problem in read.problems]
    if read.ternary is not None:
        return [
            "`config` has a `quantization_config`, the weights are written as floats. "
            "Leave the entry out"
        ]
    own = structure.entries()
    return [
        f"`config` makes `{field}` {value}, the model has {own[field]}"
        for field, value in read.structure.entries().items()
        if value != own[field]
    ]


def _pieces(names: Names, leaves: Mapping[str, Any]) -> dict[str, Piece]:
    """Every tensor on disk: its leaf and where in it. Nothing is copied yet."""
    return {
        name: Piece(leaf, index)
        for path, leaf in leaves.items()
        for index, name in tensor_names(names, path, np.shape(leaf)).items()
    }
