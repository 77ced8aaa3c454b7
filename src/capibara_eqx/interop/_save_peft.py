import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..arrays import LoRAArray
from ..internal import require_extra
from ..models import LanguageModel
from ..transforms._places import places
from ._peft_config import CONFIG, write_adapter_config
from ._peft_modules import Module, modules_of, write_name
from ._problems import refuse, some
from ._write_files import Piece, write_json, write_tensors


WEIGHTS = "adapter_model.safetensors"
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def save_peft(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters of a model as a folder that peft loads.

    Written are adapter_config.json and adapter_model.safetensors. With `base`, the
    model without adapters, in transformers, `peft.PeftModel.from_pretrained(base,
    path)` gives the same logits. What has no adapter is not written, be it trained or
    not. Files of an adapter in `path` are replaced, others stay; adapter_config.json
    comes last.

    **Arguments:**

    - `model`: as `save_hf` takes it, with adapters of `transforms.lora` on some of its
        weights; what is under them may be compressed.
    - `path`: the folder, made if it is not there.
    - `config`: further entries of adapter_config.json, such as
        `base_model_name_or_path`. They must not contradict the model.

    **Raises:**

    - `ValueError`: one for all that peft has no place for: adapters of experts and
        routers, of `dt_proj` and `out_proj` of Mamba, of an embedding that is the head
        too, or DoRA of an embedding, and adapters that differ in more than rank and
        `alpha`.
    - `OSError`: if the files cannot be written.
    - `ImportError`: without the extra `interop`.

    !!! example

        ```python
        from capibara_eqx.interop import load_peft, save_peft

        model, _ = lora(model, attention_rules(LoRA(8)), key=key)
        save_peft(model, "adapter")
        ```
    """
    require_extra("safetensors", "interop")
    modules = modules_of("save_peft", model)
    problems = _problems(model, modules)
    adapted = {name: m for name, m in modules.items() if m.place.adapter is not None}
    refuse("save_peft", "these adapters have no place in peft", problems)
    specs = {name: _adapter(module).spec for name, module in adapted.items()}
    entries = write_adapter_config(specs, _targets(modules, adapted), problems)
    for name, value in (config or {}).items():
        if entries.get(name) is not None and value != entries[name]:
            problems.append(
                f"`config` makes `{name}` {value!r}, the model has {entries[name]!r}"
            )
    refuse("save_peft", "these adapters have no place in peft", problems)
    _write(Path(path), entries | dict(config or {}), _pieces(adapted))


def _problems(model: LanguageModel, modules: Mapping[str, Module]) -> list[str]:
    adapted = {p.path: p.adapter for p in places(model) if p.adapter is not None}
    if not adapted:
        return ["the model has none. `transforms.lora` adds them"]
    known = {module.place.path for module in modules.values()}
    problems = []
    homeless = [path for path in adapted if path not in known]
    if homeless:
        problems.append(
            f"transformers has no layer, or heeds no adapter there: {some(homeless)}. "
            "`merge` the model and write it with `save_hf`"
        )
    table = adapted.get("embedding/weight")
    if table is not None and model.head is None:
        problems.append(
            "the embedding is the head too, which has no adapter in peft. `merge` it"
        )
    if table is not None and table.spec.dora:
        problems.append("DoRA of an embedding is of its columns in peft")
    kinds = {
        path: jnp.dtype(part.dtype).name
        for path, adapter in adapted.items()
        for part in adapter.adapter
    }
    odd = [f"{path} ({kind})" for path, kind in kinds.items() if kind not in _DTYPES]
    if odd:
        problems.append(f"dtypes other than {', '.join(_DTYPES)}: {some(odd)}")
    return problems


def _targets(modules: Mapping[str, Module], adapted: Mapping[str, Module]) -> list[str]:
    """Last parts of names where all such layers are adapted, else whole names."""
    by_kind = defaultdict(list)
    for name in modules:
        by_kind[name.rpartition(".")[2]].append(name)
    targets = []
    for kind, names in by_kind.items():
        chosen = [name for name in names if name in adapted]
        targets += [kind] if len(chosen) == len(names) else chosen
    return sorted(targets)


def _pieces(adapted: Mapping[str, Module]) -> dict[str, Piece]:
    pieces = {}
    for name, module in adapted.items():
        adapter = _adapter(module)
        parts = {"a": adapter.a, "b": adapter.b}
        if module.is_table:
            # Rows are outputs here and inputs there.
            parts = {"a": adapter.b.T, "b": adapter.a.T}
        if adapter.magnitude is not None:
            parts["magnitude"] = adapter.magnitude
        for part, leaf in parts.items():
            key = write_name(name, part, module.is_table)
            pieces[key] = Piece(leaf, module.index)
    return pieces


def _adapter(module: Module) -> LoRAArray:
    assert module.place.adapter is not None  # or it would not have been chosen
    return module.place.adapter


def _write(folder: Path, entries: dict[str, Any], pieces: dict[str, Piece]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        write_json(temporary / CONFIG, entries)
        write_tensors(temporary / WEIGHTS, pieces)
        # Some safetensors keep their files from all but the owner.
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)
        (folder / CONFIG).unlink(missing_ok=True)
        os.replace(temporary / WEIGHTS, folder / WEIGHTS)
        os.replace(temporary / CONFIG, folder / CONFIG)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
