import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..internal import require_extra
from ._problems import some


CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, the format's name of its dtype, the open file.

    `source`: the name of the file, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Any
    source: str

    def read(self, name: str) -> np.ndarray:
        return self.file.get_tensor(name)


class Checkpoint(NamedTuple):
    """An open checkpoint; what could not be read is in `problems`.

    `complete`: whether all tensors that it holds are known.
    """

    config: dict[str, Any] | None
    tensors: dict[str, StoredTensor]
    complete: bool
    problems: list[str]


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Opens config.json and the safetensors files; tensors are read when asked for."""
    problems: list[str] = []
    config = read_object(folder / CONFIG, problems)
    files, index = _find_files(folder, problems)
    tensors: dict[str, StoredTensor] = {}
    # Opened only after all that can be said without it.
    with ExitStack() as stack:
        readable = bool(files)
        for file in files:
            found = open_tensors(folder / file, stack, problems)
            readable = readable and found is not None
            for name, tensor in (found or {}).items():
                if index.get(name, file) == file:
                    tensors[name] = tensor
        if readable:
            absent = [name for name in index if name not in tensors]
            if absent:
                problems.append(
                    f"{INDEX} names tensors that are not in their files: {some(absent)}"
                )
        yield Checkpoint(config, tensors, readable, problems)


def _find_files(folder: Path, problems: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the files to read, and which of them holds which tensor."""
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX, problems)
        if index is None:
            return [], {}
        where = index.get("weight_map")
        if not isinstance(where, Mapping) or not all(
            isinstance(file, str) for file in where.values()
        ):
            problems.append(f"{INDEX}: `weight_map` must name the file of each tensor")
            return [], {}
        files = sorted(set(where.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            problems.append(
                f"{INDEX} names files that are not there: {some(missing)}. Download "
                "or copy them too"
            )
            files = []
        return files, dict(where)
    problems.append(f"there is neither {SINGLE} nor {INDEX}{_instead(folder)}")
    return [], {}


def _instead(folder: Path) -> str:
    """What the folder holds in the place of weights that can be read, and a remedy."""
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    others = sorted(file.name for file in folder.iterdir() if file.suffix in kinds)
    if not others:
        return ". Is the download complete?"
    shards = [name for name in others if name.endswith(".safetensors")]
    if shards:
        return f", only {some(shards)}. Download or copy {INDEX} too"
    return (
        f", only {some(others)}. Convert them: transformers.AutoModelForCausalLM"
        ".from_pretrained(path).save_pretrained(other_path)"
    )


def open_tensors(
    path: Path, stack: ExitStack, problems: list[str]
) -> dict[str, StoredTensor] | None:
    """The tensors of a file, open until `stack` ends; `None` after a problem."""
    safetensors = require_extra("safetensors", "interop")
    try:
        file = stack.enter_context(safetensors.safe_open(path, framework="np"))
    except safetensors.SafetensorError as error:
        problems.append(
            f"{path.name} is no complete safetensors file ({error}). Download or copy "
            "it again"
        )
        return None
    tensors = {}
    for name in file.keys():
        view = file.get_slice(name)
        shape = tuple(view.get_shape())
        tensors[name] = StoredTensor(shape, view.get_dtype(), file, path.name)
    return tensors


def read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in `path`, `None` after a problem."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoder of UTF-8 or of JSON
        problems.append(f"{path.name} is no JSON ({error})")
        return None
    if not isinstance(value, dict):
        problems.append(
            f"{path.name} must hold a JSON object, got {type(value).__name__}"
        )
        return None
    return value
