import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..internal import require_extra
from ._checkpoint_files import CONFIG, INDEX, SINGLE


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class Piece(NamedTuple):
    """A tensor: an array, or what lies at an index of its first axes."""

    leaf: Any
    index: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        shape = np.shape(self.leaf)[len(self.index) :]
        return int(np.prod(shape)) * jnp.dtype(self.leaf.dtype).itemsize

    def array(self) -> np.ndarray:
        """On the host, row by row: safetensors takes the memory as it lies."""
        return np.ascontiguousarray(np.asarray(self.leaf)[self.index])


def parse_size(size: int | str | None) -> int | None:
    """Bytes of a size such as `"5GB"`; `ValueError` for anything else."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    known = match is not None and match[2].upper() in _UNITS
    number = int(float(match[1]) * _UNITS[match[2].upper()]) if match and known else 0
    if isinstance(size, bool | float) or number < 1:
        raise ValueError(
            "save_hf: `max_shard_size` must be a positive number of bytes, or one with "
            f"a unit such as '500MB' or '5GB', got {size!r}."
        )
    return number


def write_checkpoint(
    folder: Path, config: dict[str, Any], pieces: Mapping[str, Piece], limit: int | None
) -> None:
    """Replace the checkpoint in `folder` by a new one, which is written first."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        write_json(temporary / CONFIG, config)
        shards = _shards(pieces, limit)
        for file, names in shards.items():
            write_tensors(temporary / file, {name: pieces[name] for name in names})
            # Some safetensors keep their files from all but the owner.
            shutil.copymode(temporary / CONFIG, temporary / file)
        if len(shards) > 1:
            total = sum(piece.nbytes for piece in pieces.values())
            where = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(temporary / INDEX, index)
        _commit(temporary, folder, list(shards))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _commit(temporary: Path, folder: Path, shards: list[str]) -> None:
    """Move the new files in place of the old ones; between, there is no config.json."""
    (folder / CONFIG).unlink(missing_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in shards:
            file.unlink()
    for file in shards:
        os.replace(temporary / file, folder / file)
    if len(shards) > 1:
        os.replace(temporary / INDEX, folder / INDEX)
    os.replace(temporary / CONFIG, folder / CONFIG)


def _shards(pieces: Mapping[str, Piece], limit: int | None) -> dict[str, list[str]]:
    """Names of the tensors in each file; one tensor is never split."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, piece in pieces.items():
        if limit is not None and groups[-1] and size + piece.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += piece.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, start=1)
    }


def write_tensors(path: Path, pieces: Mapping[str, Piece]) -> None:
    """A safetensors file that is on the disk when this returns."""
    save_file = require_extra("safetensors.numpy", "interop").save_file
    arrays = {name: piece.array() for name, piece in pieces.items()}
    # transformers asks for the format.
    save_file(arrays, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
