import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ..internal import require_extra
from ..models import LanguageModel
from ._checkpoint_files import Checkpoint, StoredTensor, open_checkpoint
from ._decoder import Decoder, abstract_model
from ._describe import array_leaves
from ._hf_config import read_config
from ._hf_names import DERIVED, MODEL, tensor_names
from ._problems import refuse, some


# Names of safetensors.
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
}


def load_hf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    scan: bool = False,
    remat: str | Callable[..., bool] | None = None,
    implementation: str | None = None,
) -> LanguageModel:
    """A language model of the Llama family from a local Hugging Face checkpoint.

    The folder holds config.json and the weights as safetensors, in one file or in
    several with an index. Read are `LlamaForCausalLM`, `MistralForCausalLM`,
    `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `MixtralForCausalLM`, with rotary
    positions that are plain, linear, llama3 or yarn. What would change the result and
    is not supported is an error. Nothing is downloaded.

    The model computes what transformers computes, but for rounding. Padding is a
    negative `segment_ids`, where transformers has a zero `attention_mask`. A model with
    an `attention_dropout` comes with dropout off: `eqx.nn.inference_mode(model, False)`
    turns it on.

    **Arguments:**

    - `path`: the folder.
    - `dtype`: of the parameters; every tensor keeps its own if not given.
    - `scan`, `remat`: see `models.Stack`. Layers with and without a window cannot be
        scanned.
    - `implementation`: passed to `kernels.attention`.

    **Returns:**

    A `models.LanguageModel`.

    **Raises:**

    - `ValueError`: one for all that is wrong: files that are missing or damaged, an
        unknown architecture, unsupported entries of config.json, tensors that are
        missing, too many, or of other shapes.
    - `ImportError`: without the extra `interop`.

    !!! example

        ```python
        from capibara_eqx.interop import load_hf, save_hf

        save_hf(transformer_language_model(256, 64, 2, 8, key=key), "checkpoint")
        model = load_hf("checkpoint", dtype=jnp.bfloat16, scan=True)
        ```
    """
    require_extra("safetensors", "interop")
    folder = Path(path)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"load_hf: `dtype` must be of floating point, got {jnp.dtype(dtype)}."
        )
    if not folder.is_dir():
        raise ValueError(
            f"load_hf: `path` must be a local folder, got {str(folder)!r}, which is "
            f"{'a file' if folder.exists() else 'not there'}. Nothing is downloaded: "
            "get a model with `hf download NAME --local-dir FOLDER` first."
        )
    with open_checkpoint(folder) as checkpoint:
        problems = list(checkpoint.problems)
        decoder = None
        if checkpoint.config is not None:
            config = read_config(checkpoint.config)
            decoder = config.decoder
            problems += config.problems
        model = None
        if decoder is not None:
            model = _abstract(decoder, problems, scan, remat, implementation)
            if model is not None and checkpoint.complete:
                tied = decoder.tie_embeddings
                problems += _mismatches(model, checkpoint, dtype, tied)
        refuse("load_hf", f"cannot read {folder}", problems)
        assert decoder is not None  # or there was a problem
        assert model is not None
        loaded = _fill(model, checkpoint, dtype)
    return eqx.nn.inference_mode(loaded) if decoder.dropout_p > 0 else loaded


def _abstract(
    decoder: Decoder, problems: list[str], scan: bool, remat, implementation
) -> LanguageModel | None:
    if scan and len(set(decoder.windows)) > 1:
        problems.append(
            "config.json: some layers have a window and some have none, so that they "
            "cannot be scanned. Pass scan=False"
        )
        scan = False
    try:
        return abstract_model(
            decoder, scan=scan, remat=remat, implementation=implementation
        )
    except ValueError as error:
        problems.append(f"config.json: {error}")
        return None


def _mismatches(
    model: LanguageModel, checkpoint: Checkpoint, dtype, tied: bool
) -> list[str]:
    """How the tensors of a checkpoint differ from those that `model` needs."""
    expected = {}
    problems, mixed = [], []
    for path, leaf in array_leaves(model).items():
        shape = leaf.shape
        names = tensor_names(path, shape)
        expected |= {name: shape[len(index) :] for index, name in names.items()}
        kinds = {
            checkpoint.tensors[name].dtype
            for name in names.values()
            if name in checkpoint.tensors
        }
        if len(kinds) > 1 and dtype is None:
            mixed.append(f"{path} ({', '.join(sorted(kinds))})")
    found = checkpoint.tensors
    missing = [name for name in expected if name not in found]
    extra = [
        name for name in found if name not in expected and not DERIVED.search(name)
    ]
    head = MODEL["head.weight"]
    if missing:
        hint = ""
        if head in missing:
            hint = "; a head that is the embedding needs `tie_word_embeddings` true"
        problems.append(f"tensors are missing: {some(missing)}{hint}")
    if tied and head in extra:
        extra.remove(head)
        problems += _untied(found)
    if extra:
        problems.append(f"tensors that the model has no place for: {some(extra)}")
    problems += [
        f"{name} must have shape {shape}, got {found[name].shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if mixed:
        problems.append(
            f"one array here is several dtypes there: {some(mixed)}. Pass `dtype`"
        )
    return problems + _unsupported_dtypes(found, expected, dtype)


def _untied(found: dict[str, StoredTensor]) -> list[str]:
    """Some files hold a tied head too; it must then be the embedding."""
    names = MODEL["embedding.weight"], MODEL["head.weight"]
    if not all(name in found for name in names):
        return []
    table, head = (found[name].read(name) for name in names)
    if np.array_equal(table, head):
        return []
    return [
        f"{names[1]} is not {names[0]}, though `tie_word_embeddings` is true. Set it "
        "to false in config.json if the head is right"
    ]


def _unsupported_dtypes(
    found: dict[str, StoredTensor], expected: dict[str, Any], dtype
) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name in expected:
        if name in found:
            kinds.setdefault(found[name].dtype, []).append(name)
    problems = []
    for kind, names in kinds.items():
        if kind not in _DTYPES:
            problems.append(
                f"tensors of dtype {kind} are not supported, only "
                f"{', '.join(_DTYPES)}: {some(names)}. Are they quantized?"
            )
        elif kind == "F64" and dtype is None and not _has_float64():
            problems.append(
                f"tensors are float64, which jax has off: {some(names)}. Pass "
                "`dtype`, or set jax_enable_x64"
            )
    return problems


def _has_float64() -> bool:
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def _fill(model, checkpoint: Checkpoint, dtype) -> LanguageModel:
    """The model with the tensors of the checkpoint, read one leaf after the other."""

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        names = tensor_names(path, leaf.shape)
        if () in names:
            value = checkpoint.tensors[names[()]].read(names[()])
            return jnp.asarray(value if dtype is None else value.astype(dtype))
        stored = {index: checkpoint.tensors[name] for index, name in names.items()}
        kind = _DTYPES[next(iter(stored.values())).dtype] if dtype is None else dtype
        stacked = np.empty(leaf.shape, kind)
        for index, name in names.items():
            stacked[index] = stored[index].read(name)
        return jnp.asarray(stacked)

    return jax.tree_util.tree_map_with_path(fill, model)
