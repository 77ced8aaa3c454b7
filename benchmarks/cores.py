"""The compiled scan in a process on one core, beside one on two.

The processes take turns. The probe, with one thread and with two, is what a second core
gives where there is nothing but arithmetic.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import probe
from ._environment import ROOT, cores
from ._harness import Contender, Entry, Prepared, Settings, race
from ._inputs import scan_inputs, scan_spec
from ._records import Measurement
from .selective_scan import ROW, expected, prepare_library


OPERATION = "selective_scan_cores"

_ONE_ONLY = "this process may not use two cores"


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield a measurement of each number of cores and mode, and of the probe."""
    shape = ("tiny", 1, 64, 128, 4) if settings.quick else tuple(ROW)
    for mode in ("forward", "forward_backward"):
        with contextlib.ExitStack() as processes:
            entries = _entries(shape, mode, processes)
            for measurement in race(settings, OPERATION, mode, entries):
                # The system tells of a process's time when it has ended: meanwhile that
                # of these counts as others'.
                yield replace(measurement, load_of_others=None)


def _entries(
    shape: tuple[Any, ...], mode: str, processes: contextlib.ExitStack
) -> list[Entry]:
    name, *sizes = shape
    spec = scan_spec(name, *sizes)
    left_out = None if hasattr(os, "sched_setaffinity") and cores() > 1 else _ONE_ONLY
    found = []
    for count, name in ((1, "cpu_1_core"), (2, "cpu_2_cores")):
        start = partial(_start, sizes, mode, count, processes)
        entry = Contender(name, start, left_out if count > 1 else None)
        found.append(Entry(spec, entry, lambda: expected(scan_inputs(*sizes), mode)))
    for threads in (1, 2):
        work = partial(probe.scan_work, int(np.prod(sizes)), sizes[-1], threads)
        entry = Contender(probe.name(threads), work)
        found.append(Entry(spec, entry, partial(probe.scan_work_expected, threads)))
    return found


def _start(
    sizes: list[int], mode: str, count: int, processes: contextlib.ExitStack
) -> Prepared:
    """A process that may use `count` cores, ready to be asked for calls."""
    command = [sys.executable, "-m", "benchmarks.cores", f"--mode={mode}", "--sizes"]
    worker = processes.enter_context(
        _confined(count, [*command, *(str(size) for size in sizes)])
    )
    ready = json.loads(_answer(worker))

    def run():
        return _ask(worker, "call")

    def outputs(_):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "outputs.npz"
            _ask(worker, f"save {path}")
            with np.load(path) as saved:
                return [saved[name] for name in saved.files]

    return Prepared(run, ready["compile_ms"], ready["temp_bytes"], outputs)


@contextlib.contextmanager
def _confined(count: int, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A child process on the first `count` cores, ended when it is no longer needed."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    # It would set the number of XLA's threads, whatever cores there are.
    environment.pop("NPROC", None)
    with _on_cores(count):
        # A child has the cores of the thread that started it.
        worker = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    with worker:
        yield worker
        # It ends where its input ends.


@contextlib.contextmanager
def _on_cores(count: int) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(own)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _ask(worker: "subprocess.Popen[str]", command: str) -> str:
    assert worker.stdin is not None
    print(command, file=worker.stdin, flush=True)
    return _answer(worker)


def _answer(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("the process that was to run the scan has ended.")
    return line


def _serve(sizes: list[int], mode: str) -> None:
    """Compile, say so, then do what each line of the input asks for."""
    prepared = prepare_library("cpu", scan_inputs(*sizes), mode)
    ready = {"compile_ms": prepared.compile_ms, "temp_bytes": prepared.temp_bytes}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        result = prepared.run()
        what, _, path = line.strip().partition(" ")
        if what == "save":
            y, *gradients = result if isinstance(result, tuple) else (result,)
            np.savez(path, y, *(g for group in gradients for g in group))
        print("done", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--sizes", type=int, nargs=4, required=True)
    options = parser.parse_args()
    _serve(options.sizes, options.mode)
