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
from ._ternary_tensors import PACKED, TernaryTensors, fake_ternary, scale_of


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
    positions that are plain, linear, llama3 or yarn, `BitNetForCausalLM`,
    `MambaForCausalLM` and `Mamba2ForCausalLM`. What would change the result and is not
    supported is an error. Nothing is downloaded.

    Ternary weights of BitNet, in its own architecture or in Llama's, become
    `arrays.TernaryArray`s that round their inputs to eight bits; those that
    transformers rounds anew at every use become `arrays.FakeQuantArray`s, which learn,
    and which `transforms.convert` packs. `transforms.dequantize` makes floats of
    either.

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
        missing, too many, or of other shapes, packed weights that are no weights.
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
        model = names = ternary = None
        if checkpoint.config is not None:
            config = read_config(checkpoint.config)
            problems += config.problems
            ternary = config.ternary
            if config.structure is not None and config.architecture is not None:
                names = ARCHITECTURES[config.architecture].names
                model = _abstract(
                    config.structure, problems, scan, remat, implementation, dtype
                )
                if model is not None and checkpoint.complete:
                    problems += _mismatches(
                        model, names, checkpoint, config.ternary, dtype
                    )
        refuse("load_hf", f"cannot read {folder}", problems)
        assert model is not None  # or there was a problem
        assert names is not None
        model = _fill(model, names, checkpoint, ternary, problems, dtype is None)
        refuse("load_hf", f"cannot read {folder}", problems)
        return model


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
    model: LanguageModel,
    names: Names,
    checkpoint: Checkpoint,
    ternary: TernaryTensors | None,
    dtype,
) -> list[str]:
    """How the tensors of a checkpoint differ from those that `model` needs."""
    expected: dict[str, tuple[int, ...]] = {}
    found, packed = checkpoint.tensors, set()
    problems, mixed = [], []
    for path, leaf in array_leaves(model).items():
        shape = leaf.shape
        parts = tensor_names(names, path, shape)
        shapes = {name: shape[len(index) :] for index, name in parts.items()}
        if ternary is not None and ternary.is_kept(path):
            packed |= ternary.packed(shapes, found)
            shapes = ternary.shapes(shapes, found)
        expected |= shapes
        of_dtype = shapes if ternary is None else ternary.of_dtype(path, shapes)
        kinds = {found[name].dtype for name in of_dtype if name in found}
        if len(kinds) > 1 and dtype is None:
            mixed.append(f"{path} ({', '.join(sorted(kinds))})")
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
    problems += [
        f"{name} must be packed in bytes, of dtype {PACKED}, got {found[name].dtype}"
        for name in packed
        if name in found and found[name].dtype != PACKED
    ]
    floats = [name for name in expected if name not in packed]
    return problems + unsupported_dtypes(found, floats, dtype)


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
    model: LanguageModel,
    names: Names,
    checkpoint: Checkpoint,
    ternary: TernaryTensors | None,
    problems: list[str],
    own_dtypes: bool,
) -> LanguageModel:
    """The model with the tensors of the checkpoint, read one leaf after the other.

    What is wrong with their values goes to `problems`.
    """
    found = checkpoint.tensors

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        parts = tensor_names(names, path, leaf.shape)
        kept = ternary if ternary is not None and ternary.is_kept(path) else None
        scaled = kept is not None and kept.scale is not None
        first = next(iter(parts.values()))
        stored = found[scale_of(first) if scaled else first].dtype
        kind = DTYPES[stored] if own_dtypes else leaf.dtype
        if kept is not None and scaled:
            return kept.read(parts, found, leaf.shape, kind, problems)
        value = _read(parts, found, leaf.shape, kind)
        return value if kept is None else fake_ternary(value)

    return jax.tree_util.tree_map_with_path(fill, model)


def _read(
    parts: Mapping[tuple[int, ...], str],
    found: dict[str, StoredTensor],
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """One array, which may be several tensors."""
    if () in parts:
        value = found[parts[()]].read(parts[()])
        return jnp.asarray(value.astype(dtype, copy=False))
    stacked = np.empty(shape, dtype)
    for index, name in parts.items():
        stacked[index] = found[name].read(name)
    return jnp.asarray(stacked)
