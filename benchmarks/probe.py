"""What this machine can do at best, by a C++ program of a few lines.

`scan_work` does the exponentials and the multiply-adds of a selective scan on operands
that never leave the registers, `copy` copies a large array. Each runs on as many
threads as it is told, without XLA.
"""

import ctypes
import functools
import tempfile
from pathlib import Path

import numpy as np

# The flags of the library's own kernels; no part of the public interface.
from capibara_eqx.kernels._native._compiler import CompileError, find_compiler

from ._harness import Absent, Prepared


_SOURCE = Path(__file__).with_name("probe.cc")

# One step size a chain; decays of 0.93 to 0.81, as in a layer. States neither grow nor
# vanish, where arithmetic would be slow.
_STEPS = np.array([0.1, 0.2, 0.3], np.float32)
_RATE, _ENTERING, _READ = -1.0, 0.5, 0.25


def name(threads: int) -> str:
    """What a probe on so many threads is recorded as, where the number matters."""
    return f"probe_{threads}_thread{'s' if threads > 1 else ''}"


def scan_work(elements: int, d_state: int, threads: int) -> Prepared:
    """The arithmetic of a scan over `elements` triples of token, channel and state.

    **Arguments:**

    - `elements`: of the scan to compare with, all rows together.
    - `d_state`: states that are summed for an output.
    - `threads`: among which the work is shared out.

    **Raises:**

    `Absent` if there is no C++ compiler.
    """
    library = _library()
    y = np.empty((threads, len(_STEPS)), np.float32)
    steps, outputs = (x.ctypes.data_as(_FLOATS) for x in (_STEPS, y))

    def run():
        return library.capibara_probe_scan(
            elements, d_state, threads, steps, _RATE, _ENTERING, _READ, outputs
        )

    # What was computed is judged here: it belongs to no shape of the scan.
    return Prepared(run, outputs=lambda tokens: y / _last_outputs(tokens, d_state))


def scan_work_expected(threads: int) -> np.ndarray:
    """What `scan_work` yields if it has done its work: ratios of one."""
    return np.ones((threads, len(_STEPS)))


def copy(size: int, threads: int) -> Prepared:
    """A copy of `size` bytes.

    **Arguments:**

    - `size`: far more than the caches hold.
    - `threads`: each copies its part.

    **Raises:**

    `Absent` if there is no C++ compiler.
    """
    library = _library()
    source = np.resize(np.arange(251, dtype=np.uint8), size)
    target = np.zeros_like(source)

    def run():
        library.capibara_probe_copy(
            source.ctypes.data, target.ctypes.data, size, threads
        )
        return target

    # The share of the bytes that have arrived.
    return Prepared(run, outputs=lambda copied: np.mean(copied == source))


def _last_outputs(tokens: int, d_state: int) -> np.ndarray:
    """The sum over the states of the last token, from the geometric series."""
    steps = _STEPS.astype(np.float64)[:, None]
    decay = np.exp2(steps * _RATE)
    updates = np.arange((tokens - 1) * d_state + 1, tokens * d_state + 1)
    h = steps * _ENTERING * (1 - decay**updates) / (1 - decay)
    return _READ * h.sum(axis=1)


_FLOATS = ctypes.POINTER(ctypes.c_float)


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise Absent("there is no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probe.so"
        try:
            compiler.compile(_SOURCE, built)
        except CompileError as error:
            raise Absent(str(error).splitlines()[0]) from None
        # A loaded file may be deleted.
        library = ctypes.CDLL(str(built))
    scan = library.capibara_probe_scan
    numbers = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    constants = (ctypes.c_float,) * 3
    scan.argtypes = (*numbers, _FLOATS, *constants, _FLOATS)
    scan.restype = ctypes.c_int64
    library.capibara_probe_copy.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int),
    )
    library.capibara_probe_copy.restype = None
    return library
