import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


# What stands between two documents, and what no text file has near its start.
SEPARATOR = b"\0"
_SNIFFED_BYTES = 8192


@dataclass(frozen=True)
class Document:
    name: str
    content: bytes


def file_mode(path: str | os.PathLike[str]) -> int:
    shown = repr(os.fspath(path))
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"`path` must be a text file or a folder, but {shown} does not exist. "
            f"Check the spelling; relative paths start at {os.getcwd()!r}."
        ) from error
    except PermissionError as error:
        raise _unreadable(shown) from error


def _unreadable(shown: str) -> PermissionError:
    return PermissionError(
        f"`path`: no permission to read {shown}. Make it readable (`chmod u+r` for a "
        "file, `chmod u+rx` for a folder) or choose another text."
    )


def read(file: Path, *, text_only: bool = False) -> bytes:
    """Content of `file`; empty for a binary file if `text_only`."""
    try:
        with file.open("rb") as stream:
            start = stream.read(_SNIFFED_BYTES)
            if text_only and SEPARATOR in start:
                return b""
            return start + stream.read()
    except PermissionError as error:
        raise _unreadable(repr(str(file))) from error


def walk(
    root: Path, keep_folder: Callable[[str], bool], keep_file: Callable[[str], bool]
) -> list[str]:
    """Relative names, `/` between their parts, of the files under `root`, sorted."""

    def stop(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise _unreadable(repr(str(error.filename))) from error
        raise error

    found = []
    for folder, subfolders, files in os.walk(root, onerror=stop):
        subfolders[:] = filter(keep_folder, subfolders)
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in filter(keep_file, files)]
    return sorted(found)


def read_files(root: Path, names: Iterable[str]) -> tuple[list[Document], int]:
    """The documents among the files `names` of `root`, and how many are none."""
    documents, skipped = [], 0
    for name in names:
        file = root / name
        # Opening a pipe would wait for a writer for ever, so ask what it is first.
        content = read(file, text_only=True) if file.is_file() else b""
        if content:
            documents.append(Document(name, content))
        else:
            skipped += 1
    return documents, skipped


def hash_name(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def hash_documents(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        # Parts of fixed length: no two lists of documents feed the same bytes.
        digest.update(hash_name(document.name))
        digest.update(hashlib.sha256(document.content).digest())
    return digest.hexdigest()
