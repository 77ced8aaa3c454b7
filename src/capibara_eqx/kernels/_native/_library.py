"""Kernels in C++: compiled at first use, kept in the user's cache, loaded once."""

import contextlib
import ctypes
import functools
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

import jax

from ._cache import cache_folder, read_library, write_library
from ._compiler import CompileError, Compiler, find_compiler


class Unavailable(Exception):
    """A compiled kernel cannot be had on this machine; the text says why."""


def handlers(source: Path, names: tuple[str, ...]) -> None:
    """Make the XLA handlers `names` of a C++ source callable by `jax.ffi.ffi_call`.

    The first call of a process loads the library, the first on a machine compiles it.

    **Raises:**

    `Unavailable` if it can be neither found nor compiled, again at every call.
    """
    reason = _register(source, names)
    if reason is not None:
        raise Unavailable(reason)


_LOCK = threading.Lock()


def _register(source: Path, names: tuple[str, ...]) -> str | None:
    """Why the handlers are not there, `None` if they are; the work is done once."""
    # XLA refuses a second library under the same names.
    with _LOCK:
        return _register_once(source, names)


@functools.cache
def _register_once(source: Path, names: tuple[str, ...]) -> str | None:
    try:
        library = _load(source)
    except Unavailable as reason:
        return str(reason)
    for name in names:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


def _load(source: Path) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise Unavailable(
            "no C++ compiler was found (looked for $CXX, c++, g++, clang++); install "
            "one, for example with `apt-get install g++`"
        )
    try:
        return _kept_or_built(compiler, source)
    except (CompileError, OSError) as error:
        warnings.warn(
            f"{source.name} of {source.parent.name} could not be compiled, so a slower "
            f"form of it will run on the CPU. {error}",
            stacklevel=2,
        )
        raise Unavailable(str(error).splitlines()[0]) from None


def _kept_or_built(compiler: Compiler, source: Path) -> ctypes.CDLL:
    name = f"{source.parent.name.strip('_')}-{compiler.key(source)}"
    folder = cache_folder()
    kept = None if folder is None else read_library(folder, name)
    if kept is not None:
        # One that does not load, of a system that shares the folder, is made anew.
        with contextlib.suppress(OSError):
            return _open(kept)
    with tempfile.TemporaryDirectory(prefix="capibara-eqx-") as scratch:
        built = Path(scratch) / "library.so"
        compiler.compile(source, built)
        # Loaded before it is kept: what does not load is of no use to others. A loaded
        # file may be deleted.
        library = _open(built, folder)
        if folder is not None:
            write_library(folder, name, built)
    return library


def _open(path: Path, elsewhere: Path | None = None) -> ctypes.CDLL:
    """Load a library, by a copy `elsewhere` if its folder may hold no programs.

    Caches and folders for temporary files, which `elsewhere` is if not given, are
    sometimes mounted so (noexec).
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        prefix = "capibara-eqx-"
        try:
            with tempfile.TemporaryDirectory(prefix=prefix, dir=elsewhere) as scratch:
                copy = shutil.copyfile(path, Path(scratch) / path.name)
                return ctypes.CDLL(str(copy))
        except OSError:
            # The first says what is wrong with the library.
            raise error from None
