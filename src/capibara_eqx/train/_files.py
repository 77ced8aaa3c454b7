import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


_RESUME = "resume the run: what its last checkpoint holds is not lost"


@contextmanager
def writing(path: Path, then: str = _RESUME) -> Iterator[None]:
    """Name `path` in the error, which the system leaves out of a failed write.

    `then` is what to do after there is room to write.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise OSError(
            f"Could not write {path}: {cause}. Free some space on that disk or make "
            f"the folder writable, then {then}."
        ) from error


def write_text(path: Path, text: str, then: str = _RESUME) -> None:
    """Replace the file `path`; it is the old or the new one, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, then):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any, then: str = _RESUME) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n", then)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; `ValueError` names the file and ends on `remedy`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). {remedy}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} must hold a JSON object, got {type(value).__name__}. {remedy}"
        )
    return value


def checksums(folder: Path, parts: Sequence[str]) -> dict[str, list[int]]:
    """Size and CRC-32 of every file in the `parts` of `folder`, by relative name."""
    return {
        file.relative_to(folder).as_posix(): _checksum(file)
        for part in parts
        for file in sorted((folder / part).rglob("*"))
        if file.is_file()
    }


def _checksum(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def find_damage(folder: Path, expected: dict[str, list[int]]) -> str | None:
    """The first file under `folder` that is not as `expected`, in words."""
    for name, (size, crc) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        found = _checksum(file)
        if found[0] != size:
            return f"{name} has {found[0]} bytes instead of {size}"
        if found[1] != crc:
            return f"the content of {name} has changed"
    return None
