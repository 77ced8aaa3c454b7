import fnmatch
import os
import platform
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ._documents import (
    SEPARATOR,
    Document,
    file_mode,
    hash_documents,
    hash_name,
    read,
    read_files,
    walk,
)


# Tests and installed packages are not the library itself, and what is generated for
# one machine would change the corpus from machine to machine.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, eq=False)
class Corpus:
    r"""Text as bytes, split into a part to train on and a part held out.

    Documents are joined with one NUL byte (`b"\0"`) between them, in the order of
    their names, so that a model learns where a document ends and can emit NUL as its
    stop token. Both arrays are read-only.

    **Fields:**

    - `train`, `heldout`: bytes; no byte of a file is in both.
    - `files`: number of files read, on both sides together.
    - `heldout_files`: how many of them are held out; 0 where a single file was cut.
    - `sha256`: hex digest over name and content of every file read. It does not
        depend on where the files lie or on how they were split.
    - `source`: what was read, in words.
    - `skipped`: files of a folder that were left out because they are empty, binary
        or not regular files.
    """

    train: UInt8[np.ndarray, " train_bytes"]
    heldout: UInt8[np.ndarray, " heldout_bytes"]
    files: int
    heldout_files: int
    sha256: str
    source: str
    skipped: int = 0


def read_stdlib_corpus(*, heldout_fraction: float = 0.04) -> Corpus:
    """The running Python's own standard library sources: real text on any machine.

    All `.py` files are read but those of test suites, of installed packages and those
    generated for one machine. Whole files are held out, as in `read_text_corpus`.

    **Arguments:**

    - `heldout_fraction`: share of the bytes to hold out, between 0 and 1.

    **Returns:**

    A `Corpus` of about 12 MB.

    **Raises:**

    - `FileNotFoundError`: this Python came without its sources.
    - `PermissionError`: a source cannot be read.
    - `ValueError`: `heldout_fraction` is out of range or leaves nothing to train on.

    **Example:**

        corpus = read_stdlib_corpus()
        dataset = ByteDataset(corpus.train, seq_len=256, batch_size=16)
    """
    _check_fraction(heldout_fraction)
    root = Path(sysconfig.get_path("stdlib"))
    found = walk(root, _is_stdlib_folder, _is_stdlib_source) if root.is_dir() else []
    documents, skipped = read_files(root, found)
    if len(documents) < 2:
        raise FileNotFoundError(
            f"This Python has no standard library sources (.py files) in {str(root)!r}."
            " Use a Python that ships them, or give a text of your own to "
            "`read_text_corpus`."
        )
    source = f"standard library of Python {platform.python_version()}"
    return _split_by_file(documents, heldout_fraction, source, skipped)


def read_text_corpus(
    path: str | os.PathLike[str],
    *,
    heldout_fraction: float = 0.04,
    pattern: str = "*",
    min_train_bytes: int = 1,
) -> Corpus:
    """A text file, or all text files of a folder, as a `Corpus`.

    Of a single file, whatever its bytes, the last `heldout_fraction` is held out. Of
    a folder whole files are: in the order of a hash of their relative names, equal on
    every machine, until they make up `heldout_fraction` of the bytes. A file larger
    than that share is passed over; where all are, the smallest file is held out.

    A folder is read with its subfolders. Hidden files and folders (a leading dot) and
    links to folders are left out, and so are, counted in `Corpus.skipped`, files that
    are empty, not regular, or binary, which means a NUL among the first 8192 bytes.

    **Arguments:**

    - `path`: a file or a folder.
    - `heldout_fraction`: share of the bytes to hold out, between 0 and 1.
    - `pattern`: which file names of a folder to read, such as `"*.txt"`; upper and
        lower case differ.
    - `min_train_bytes`: least number of bytes to be left for training.

    **Returns:**

    A `Corpus`.

    **Raises:**

    - `FileNotFoundError`: `path` does not exist.
    - `PermissionError`: `path`, or something in it, cannot be read.
    - `ValueError`: `path` is neither a file nor a folder, holds no text, or too little
        of it to train on or to hold out; or `heldout_fraction` is out of range.

    **Example:**

        corpus = read_text_corpus("my-notes", pattern="*.md", min_train_bytes=4096)
    """
    _check_fraction(heldout_fraction)
    mode = file_mode(path)
    source = os.fspath(path)
    if stat.S_ISREG(mode):
        document = Document(Path(path).name, read(Path(path)))
        corpus = _split_one(document, heldout_fraction, source)
    elif stat.S_ISDIR(mode):
        documents, skipped = _read_folder(Path(path), pattern)
        corpus = _split_by_file(documents, heldout_fraction, source, skipped)
    else:
        raise ValueError(
            f"`path` must be a text file or a folder, but {source!r} is a device, pipe "
            "or socket. Save its content to a file first."
        )
    if corpus.train.size < min_train_bytes:
        raise ValueError(
            f"`path`: {source!r} leaves {corpus.train.size} bytes for training, but "
            f"at least {min_train_bytes} are needed. Give a longer text, a smaller "
            "`heldout_fraction`, or train with shorter or fewer rows a batch."
        )
    return corpus


def _read_folder(folder: Path, pattern: str) -> tuple[list[Document], int]:
    found = walk(
        folder,
        lambda name: not name.startswith("."),
        lambda name: not name.startswith(".") and fnmatch.fnmatchcase(name, pattern),
    )
    documents, skipped = read_files(folder, found)
    if not documents:
        raise ValueError(
            f"`path` must hold text, but in the folder {str(folder)!r} {len(found)} "
            f"files match the pattern {pattern!r}, of which {skipped} are empty, "
            "binary or not regular files. Check the folder and the pattern; hidden "
            "files are not read."
        )
    if len(documents) == 1:
        raise ValueError(
            f"`path`: the folder {str(folder)!r} has one text file only, "
            f"{documents[0].name!r}, so no whole file can be held out. Pass that file "
            "itself as `path`, and its last part is held out."
        )
    return documents, skipped


def _check_fraction(heldout_fraction: float) -> None:
    if not 0 < heldout_fraction < 1:
        raise ValueError(
            "`heldout_fraction` must lie between 0 and 1, both excluded, got "
            f"{heldout_fraction}. 0.04 holds out one byte of 25."
        )


def _is_stdlib_folder(name: str) -> bool:
    return name not in _STDLIB_SKIPPED_FOLDERS and not name.startswith(
        (".", *_STDLIB_SKIPPED_PREFIXES)
    )


def _is_stdlib_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(
        (".", *_STDLIB_SKIPPED_PREFIXES)
    )


def _choose_heldout(documents: list[Document], fraction: float) -> set[str]:
    """Names of the documents to hold out; `read_text_corpus` states the rule."""
    share = fraction * sum(len(document.content) for document in documents)
    by_hash = sorted(documents, key=lambda document: hash_name(document.name))
    chosen: set[str] = set()
    size = 0
    for document in by_hash:
        if size >= share:
            break
        if len(document.content) <= share:
            chosen.add(document.name)
            size += len(document.content)
    return chosen or {min(by_hash, key=lambda document: len(document.content)).name}


def _split_by_file(
    documents: list[Document], fraction: float, source: str, skipped: int
) -> Corpus:
    chosen = _choose_heldout(documents, fraction)
    if len(chosen) == len(documents):
        raise ValueError(
            f"`heldout_fraction` {fraction} holds out all {len(documents)} files and "
            "leaves nothing to train on. Lower it; 0.04 is usual."
        )
    train = SEPARATOR.join(d.content for d in documents if d.name not in chosen)
    heldout = SEPARATOR.join(d.content for d in documents if d.name in chosen)
    return Corpus(
        train=np.frombuffer(train, np.uint8),
        heldout=np.frombuffer(heldout, np.uint8),
        files=len(documents),
        heldout_files=len(chosen),
        sha256=hash_documents(documents),
        source=source,
        skipped=skipped,
    )


def _split_one(document: Document, fraction: float, source: str) -> Corpus:
    content = np.frombuffer(document.content, np.uint8)
    heldout = int(fraction * content.size)
    if content.size == 0:
        raise ValueError(
            f"`path` must hold text, but {source!r} is an empty file (0 bytes). Check "
            "that it was written to the end, or give another text."
        )
    if heldout == 0:
        raise ValueError(
            f"`path`: {source!r} has {content.size} bytes, too few to hold out "
            f"{fraction:g} of them. Give a longer text or a larger `heldout_fraction`."
        )
    return Corpus(
        train=content[:-heldout],
        heldout=content[-heldout:],
        files=1,
        heldout_files=0,
        sha256=hash_documents([document]),
        source=source,
    )
