import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ..internal import require_extra
from ..models import LanguageModel
from ._checkpoint_files import Checkpoint, StoredTensor, open_checkpoint
from ._describe import array_leaves
from ._hf_config import ARCHITECTURES, read_config
from ._hf_names import Names, tensor_names
from ._problems import refuse, some
from ._structure import Structure, abstract_model


# Names of safetensors.
DTYPES: dict[str, Any] = {
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
    """A language model from a local Hugging Face checkpoint.

    The folder holds config.json and the weights as safetensors, in one file or in
    several with an index. Read are `LlamaForCausalLM`, `MistralForCausalLM`,
    `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `MixtralForCausalLM`, with rotary
    positions that are plain, linear, llama3 or yarn, `MambaForCausalLM` and
    `Mamba2ForCausalLM`. What would change the result and is not supported is an error.
    Nothing is downloaded.

    The model computes what transformers computes for a whole text, but for rounding,
    and the same from a cache. Padding is a negative `segment_ids`, where transformers
    has a zero `attention_mask`. A model with an `attention_dropout` comes with dropout
    off: `eqx.nn.inference_mode(model, False)` turns it on.

    **Arguments:**

    - `path`: the folder.
    - `dtype`: of the parameters, but for those that the layers keep in float32 or
        wider, such as `Mamba.A_log`; every tensor keeps its own if not given.
    - `scan`, `remat`: see `models.Stack`. Layers with and without a window cannot be
        scanned.
    - `implementation`: passed to `kernels.attention`, or to `kernels.causal_conv` with
        `kernels.selective_scan` or `kernels.ssd`.

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
        model = names = None
        if checkpoint.config is not None:
            config = read_config(checkpoint.config)
            problems += config.problems
            if config.structure is not None and config.architecture is not None:
                names = ARCHITECTURES[config.architecture].names
                model = _abstract(
                    config.structure, problems, scan, remat, implementation, dtype
                )
                if model is not None and checkpoint.complete:
                    problems += _mismatches(model, names, checkpoint, dtype)
        refuse("load_hf", f"cannot read {folder}", problems)
        assert model is not None  # or there was a problem
        assert names is not None
        return _fill(model, names, checkpoint, own_dtypes=dtype is None)


def _abstract(
    structure: Structure, problems: list[str], scan: bool, remat, implementation, dtype
) -> LanguageModel | None:
    differing = structure.differing()
    if scan and differing:
        problems.append(
            f"config.json: layers differ in {', '.join(differing)}, so that they "
            "cannot be scanned. Pass scan=False"
        )
        scan = False
    try:
        return abstract_model(
            structure,
            scan=scan,
            remat=remat,
            implementation=implementation,
            dtype=dtype,
        )
    except ValueError as error:
        problems.append(f"config.json: {error}")
        return None


def _mismatches(
    model: LanguageModel, names: Names, checkpoint: Checkpoint, dtype
) -> list[str]:
    """How the tensors of a checkpoint differ from those that `model` needs."""
    expected = {}
    problems, mixed = [], []
    for path, leaf in array_leaves(model).items():
        shape = leaf.shape
        parts = tensor_names(names, path, shape)
        expected |= {name: shape[len(index) :] for index, name in parts.items()}
        kinds = {
            checkpoint.tensors[name].dtype
            for name in parts.values()
            if name in checkpoint.tensors
        }
        if len(kinds) > 1 and dtype is None:
            mixed.append(f"{path} ({', '.join(sorted(kinds))})")
    found = checkpoint.tensors
    missing = [name for name in expected if name not in found]
    extra = [
        name
        for name in found
        if name not in expected and not (names.derived and names.derived.search(name))
    ]
    head = names.head
    if missing:
        hint = ""
        if head in missing:
            hint = "; a head that is the embedding needs `tie_word_embeddings` true"
        problems.append(f"tensors are missing: {some(missing)}{hint}")
    if model.head is None and head in extra:
        extra.remove(head)
        problems += _untied(names.embedding, head, found)
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
    return problems + unsupported_dtypes(found, expected, dtype)


def _untied(table: str, head: str, found: dict[str, StoredTensor]) -> list[str]:
    """Some files hold a tied head too; it must then be the embedding."""
    if table not in found:
        return []
    if np.array_equal(found[table].read(table), found[head].read(head)):
        return []
    return [
        f"{head} is not {table}, though `tie_word_embeddings` is true. Set it to false "
        "in config.json if the head is right"
    ]


def unsupported_dtypes(
    found: Mapping[str, StoredTensor],
    expected: Iterable[str],
    dtype: DTypeLike | None = None,
    fix: str = "Pass `dtype`, or set",
) -> list[str]:
    """What is wrong with the dtypes of the expected tensors, read as `dtype`."""
    kinds: dict[str, list[str]] = {}
    for name in expected:
        if name in found:
            kinds.setdefault(found[name].dtype, []).append(name)
    problems = []
    for kind, names in kinds.items():
        if kind not in DTYPES:
            problems.append(
                f"tensors of dtype {kind} are not supported, only "
                f"{', '.join(DTYPES)}: {some(names)}. Are they quantized?"
            )
        elif kind == "F64" and dtype is None and not _has_float64():
            problems.append(
                f"tensors are float64, which jax has off: {some(names)}. {fix} "
                "jax_enable_x64"
            )
    return problems


def _has_float64() -> bool:
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def _fill(
    model: LanguageModel, names: Names, checkpoint: Checkpoint, *, own_dtypes: bool
) -> LanguageModel:
    """The model with the tensors of the checkpoint, read one leaf after the other."""

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        parts = tensor_names(names, path, leaf.shape)
        stored = {index: checkpoint.tensors[name] for index, name in parts.items()}
        first = DTYPES[next(iter(stored.values())).dtype]
        kind = first if own_dtypes else leaf.dtype
        if () in parts:
            value = stored[()].read(parts[()])
            return jnp.asarray(value.astype(kind, copy=False))
        stacked = np.empty(leaf.shape, kind)
        for index, name in parts.items():
            stacked[index] = stored[index].read(name)
        return jnp.asarray(stacked)

    return jax.tree_util.tree_map_with_path(fill, model)
