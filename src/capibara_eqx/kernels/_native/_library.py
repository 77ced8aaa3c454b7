"""Kernels in C++: compiled at first use, kept in the user's cache, loaded once."""

import ctypes
import functools
import tempfile
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


@functools.cache
def _register(source: Path, names: tuple[str, ...]) -> str | None:
    """Why the handlers are not there, `None` if they are; the work is done once."""
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
    name = f"{source.parent.name.strip('_')}-{compiler.key(source)}"
    folder, found = cache_folder(), None
    if folder is not None:
        found = read_library(folder, name)
    if found is not None:
        return ctypes.CDLL(str(found))
    with tempfile.TemporaryDirectory(prefix="capibara-eqx-") as scratch:
        built = Path(scratch) / "library.so"
        _compile(compiler, source, built)
        kept = None if folder is None else write_library(folder, name, built)
        # What cannot be kept serves this process: a loaded file may be deleted.
        return ctypes.CDLL(str(built if kept is None else kept))


def _compile(compiler: Compiler, source: Path, target: Path) -> None:
    try:
        compiler.compile(source, target)
    except CompileError as error:
        warnings.warn(
            f"{source.name} of {source.parent.name} could not be compiled, so a slower "
            f"form of it will run on the CPU. {error}",
            stacklevel=2,
        )
        first_line = str(error).splitlines()[0]
        raise Unavailable(first_line) from None
