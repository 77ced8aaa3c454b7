"""A Mamba layer forward over one long row, in a fresh process, for its peak memory.

The peak is that of the whole process: interpreter, libraries, weights, input, output.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.layers import Mamba

from . import _oracle
from ._environment import ROOT, Load
from ._harness import Settings, compile_timed, max_error, temp_bytes
from ._records import Measurement
from .decode import layer_weights


OPERATION = "mamba_layer_memory"

# Outputs compared with the reference: the layer is causal, so the first tell enough.
_JUDGED = 256


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield the one measurement."""
    d_model, seq = (16, 300) if settings.quick else (768, 100_000)
    spec = {"name": f"{seq}_tokens", "batch": 1, "seq": seq, "d_model": d_model}
    sizes = [f"--d-model={d_model}", f"--seq={seq}"]
    before = Load.now()
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.layer_memory", *sizes],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    load = None if before is None else before.of_others(Load.now())
    # Libraries may print, and the numbers come last.
    measured = json.loads(child.stdout.splitlines()[-1])
    yield Measurement(
        OPERATION, "default", spec, "forward", load_of_others=load, **measured
    )


def _run(d_model: int, seq: int) -> dict[str, object]:
    layer = Mamba(d_model, key=jax.random.key(0))
    arrays, static = eqx.partition(layer, eqx.is_array)
    # Drawn by jax, so that no float64 copy counts in the peak.
    x = jax.random.normal(jax.random.key(1), (1, seq, d_model), jnp.float32)
    executable, compile_ms = compile_timed(
        lambda arrays, x: eqx.combine(arrays, static)(x), arrays, x
    )
    times = []
    for _ in range(2):
        start = time.perf_counter()
        y = jax.block_until_ready(executable(arrays, x))
        times.append((time.perf_counter() - start) * 1e3)
        head = np.asarray(y[:, :_JUDGED])
        del y
    peak = peak_rss_bytes()
    judged = np.asarray(x[:, :_JUDGED])
    error = max_error(head, _oracle.mamba(layer_weights(layer), judged))
    return {
        "compile_ms": round(compile_ms, 1),
        "evaluation_ms": [round(t, 1) for t in times],
        "median_ms": round(float(np.median(times)), 1),
        "temp_bytes": temp_bytes(executable),
        "max_error": float(f"{error:.3g}"),
        "peak_rss_bytes": peak,
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` of a child that was started by vfork includes its parent's peak.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(_run(options.d_model, options.seq)))
