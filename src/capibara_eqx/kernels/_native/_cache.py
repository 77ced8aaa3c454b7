"""The user's cache of compiled libraries.

A library is two files: itself, and the digest of its bytes. Both are written under
another name and then renamed, so that whoever reads sees all of one or nothing of it,
and what a crash or a full disk has cut short is never loaded.
"""

import hashlib
import os
import secrets
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Where compiled libraries are kept, made if need be; `None` if that cannot be.

    `$CAPIBARA_EQX_CACHE` if it is set, else the folder for caches that the system's
    conventions name.
    """
    chosen = os.environ.get("CAPIBARA_EQX_CACHE")
    # Absolute, since the system looks for a bare file name elsewhere.
    folder = (Path(chosen) if chosen else _user_cache() / "capibara_eqx").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _user_cache() -> Path:
    home = Path(os.environ.get("HOME") or os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")


def read_library(folder: Path, name: str) -> Path | None:
    """The library `name`, if it is there and whole."""
    path, digest = folder / f"{name}.so", folder / f"{name}.sha256"
    try:
        if digest.read_text() == _digest(path.read_bytes()):
            return path
    except (OSError, UnicodeDecodeError):
        return None
    return None


def write_library(folder: Path, name: str, built: Path) -> Path | None:
    """Keep the library at `built` as `name`; `None` if the folder does not take it."""
    content = built.read_bytes()
    path = folder / f"{name}.so"
    try:
        _write(path, content)
        _write(folder / f"{name}.sha256", _digest(content).encode())
    except OSError:
        return None
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
