import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..arrays import AbstractWeight, LoRA, LoRAArray
from ..internal import accumulator_dtype, require_extra
from ..models import LanguageModel
from ..transforms._places import Place, places, replace
from ._checkpoint_files import StoredTensor, open_tensors, read_object
from ._load import DTYPES, unsupported_dtypes
from ._peft_config import CONFIG, AdapterConfig, read_adapter_config
from ._peft_modules import PREFIX, Module, modules_of, parse_name
from ._problems import refuse, some
from ._save_peft import WEIGHTS


# The tensors of one layer, by their part of the adapter.
Parts = Mapping[str, tuple[str, StoredTensor]]


def load_peft(path: str | os.PathLike[str], model: LanguageModel) -> LanguageModel:
    """A model with the adapters of a local folder that peft wrote.

    The folder holds adapter_config.json and adapter_model.safetensors, of LoRA, rsLoRA
    or DoRA. With the model that they were trained on, the logits are those of peft but
    for rounding. Dropout is off, as in models of `load_hf`:
    `eqx.nn.inference_mode(model, False)` turns it on.

    **Arguments:**

    - `path`: the folder.
    - `model`: as `load_hf` reads it, scanned or not, its weights compressed or not.

    **Returns:**

    The model, with adapters of the dtypes in the file.

    **Raises:**

    - `ValueError`: one for all that is wrong: files that are missing or damaged,
        entries of adapter_config.json that are not supported, tensors without a place,
        or of other shapes.
    - `ImportError`: without the extra `interop`.

    !!! example

        ```python
        from capibara_eqx.interop import load_peft, save_peft

        adapted, _ = lora(model, attention_rules(LoRA(8)), key=key)
        save_peft(adapted, "adapter")
        same = load_peft("adapter", model)
        ```
    """
    require_extra("safetensors", "interop")
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"load_peft: `path` must be a local folder, got {str(folder)!r}, which is "
            f"{'a file' if folder.exists() else 'not there'}. Nothing is downloaded."
        )
    modules = modules_of("load_peft", model)
    adapted = [place.path for place in places(model) if place.adapter is not None]
    problems: list[str] = []
    if adapted:
        problems.append(
            f"`model` has adapters already: {some(adapted)}. `merge` them first"
        )
    entries = read_object(folder / CONFIG, problems)
    config = None if entries is None else read_adapter_config(entries, problems)
    with ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        if (folder / WEIGHTS).is_file():
            tensors = open_tensors(folder / WEIGHTS, stack, problems) or {}
            problems += unsupported_dtypes(tensors, tensors, fix="Set")
        else:
            problems.append(f"{WEIGHTS} is missing{_instead(folder)}")
        refuse("load_peft", f"cannot read {folder}", problems)
        assert config is not None  # or there was a problem
        found = _by_module(tensors, modules, model, problems)
        specs = _specs(found, modules, config, problems)
        _check_stacks(found, modules, specs, problems)
        refuse("load_peft", f"cannot read {folder}", problems)
        return replace(model, _nodes(found, modules, specs))


def _instead(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return ", there is adapter_model.bin: load and save it with peft"
    return ""


def _by_module(
    tensors: Mapping[str, StoredTensor],
    modules: Mapping[str, Module],
    model: LanguageModel,
    problems: list[str],
) -> dict[str, Parts]:
    """The tensors of every layer that has an adapter."""
    found: dict[str, dict[str, tuple[str, StoredTensor]]] = defaultdict(dict)
    unknown, homeless = [], []
    for name, tensor in tensors.items():
        parsed = parse_name(name)
        module = None if parsed is None else modules.get(parsed.module)
        if parsed is None:
            unknown.append(name)
        elif module is None:
            homeless.append(parsed.module)
        elif parsed.part == "weight":
            problems += _other_weight(name, tensor, module)
        elif parsed.part != "magnitude" and parsed.is_table != module.is_table:
            unknown.append(name)
        else:
            found[parsed.module][parsed.part] = (name, tensor)
    if unknown:
        problems.append(f"tensors that are no part of an adapter: {some(unknown)}")
    if homeless:
        names = list(dict.fromkeys(homeless))
        hint = " The head is the embedding." if model.head is None else ""
        problems.append(
            "layers that the model does not have, or whose adapter transformers does "
            f"not heed: {some(names)}.{hint}"
        )
    table = [name for name in found if modules[name].is_table]
    if table and model.head is None:
        problems.append(
            f"{table[0]} has an adapter there and the head has none, here both are one "
            "table. Load the model with a head of its own"
        )
    if not found and not problems:
        problems.append(f"{WEIGHTS} holds no adapter")
    return dict(found)


def _other_weight(name: str, tensor: StoredTensor, module: Module) -> list[str]:
    """peft writes embeddings and heads beside adapters; they must be the model's."""
    weight = module.place.value
    if isinstance(weight, AbstractWeight):
        return []
    own = np.asarray(weight)[module.index]
    if own.shape == tensor.shape:
        stored = tensor.read(name).astype(own.dtype)
        if np.array_equal(stored, own):
            return []
    return [
        f"{name.removeprefix(PREFIX)} is not that of `model`: it was trained or "
        "resized. Put it into the model first, as peft's `merge_and_unload` does"
    ]


def _specs(
    found: Mapping[str, Parts],
    modules: Mapping[str, Module],
    config: AdapterConfig,
    problems: list[str],
) -> dict[str, LoRA]:
    """What each layer has, where its tensors fit."""
    specs = {}
    for name, parts in found.items():
        if config.dora and modules[name].is_table:
            problems.append(f"{name}: DoRA of an embedding is not supported")
            continue
        try:
            spec = config.spec(name)
        except ValueError as error:
            problems.append(f"{CONFIG}: {name}: {error}")
            continue
        wrong = _misfits(name, parts, modules[name], spec)
        problems += wrong
        if not wrong:
            specs[name] = spec
    return specs


def _misfits(name: str, parts: Parts, module: Module, spec: LoRA) -> list[str]:
    *_, out, size = module.place.value.shape
    shapes = {"a": (spec.rank, size), "b": (out, spec.rank)}
    if module.is_table:
        shapes = {"a": (spec.rank, out), "b": (size, spec.rank)}
    if spec.dora:
        shapes["magnitude"] = (out,)
    missing = [part for part in shapes if part not in parts]
    extra = [parts[part][0] for part in parts if part not in shapes]
    problems = []
    if missing:
        problems.append(f"{name}: there is no {' and no '.join(missing)}")
    if extra:
        problems.append(f"{some(extra)}: `use_dora` is false")
    problems += [
        f"{parts[part][0]} must have shape {shape}, got {parts[part][1].shape}"
        for part, shape in shapes.items()
        if part in parts and parts[part][1].shape != shape
    ]
    return problems


def _check_stacks(
    found: Mapping[str, Parts],
    modules: Mapping[str, Module],
    specs: Mapping[str, LoRA],
    problems: list[str],
) -> None:
    """Layers of a scanned stack have adapters alike, or none."""
    for place, names in _by_place(modules).items():
        kinds = set()
        for name in names:
            parts = found.get(name, {})
            kinds.add((specs.get(name), *sorted(t.dtype for _, t in parts.values())))
        if len(kinds) > 1 and any(name in specs for name in names):
            problems.append(
                f"the layers of {place} have different adapters, or some have none, so "
                "that they cannot be scanned. Load the model with scan=False"
            )


def _nodes(found, modules, specs) -> dict[tuple, LoRAArray]:
    """What stands in the places of the weights."""
    new = {}
    for names in _by_place(modules).values():
        if names[0] not in specs:
            continue
        place, spec = modules[names[0]].place, specs[names[0]]
        read = [_read(found[name], modules[name].is_table) for name in names]
        stack = place.value.shape[:-2]
        parts = {
            part: jnp.asarray(np.stack([r[part] for r in read]))
            if stack
            else jnp.asarray(read[0][part])
            for part in read[0]
        }
        new[place.keys] = _node(place, spec, parts)
    return new


def _node(place: Place, spec: LoRA, parts) -> LoRAArray:
    dtype = parts["a"].dtype
    if dtype != accumulator_dtype(place.value.dtype):
        spec = LoRA(spec.rank, spec.alpha, spec.dropout, spec.rs, spec.dora, dtype)
    return LoRAArray(
        base=place.value,
        a=parts["a"],
        b=parts["b"],
        spec=spec,
        magnitude=parts.get("magnitude"),
        inference=True,
    )


def _read(parts: Parts, is_table: bool) -> dict[str, np.ndarray]:
    arrays = {
        part: tensor.read(name).astype(DTYPES[tensor.dtype], copy=False)
        for part, (name, tensor) in parts.items()
    }
    if is_table:
        # Rows are outputs here and inputs there.
        arrays |= {"a": arrays["b"].T, "b": arrays["a"].T}
    return arrays


def _by_place(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Names of the layers of every weight, in the order of a stack."""
    by_place = defaultdict(list)
    for name, module in modules.items():
        by_place[module.place.path].append(name)
    return dict(by_place)
