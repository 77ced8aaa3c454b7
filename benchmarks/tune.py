"""`python -m benchmarks.tune`: measure the kernels' block sizes on this device.

Writes the best number of tokens a chunk into the library's table of tuned sizes, under
the kind of the device. Figures are medians, taken in turns; a change of less than
`_WORTH` is noise, and leaves the table alone.
"""

import json
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp

# What is tuned is no part of the public interface.
from capibara_eqx.kernels import _backends
from capibara_eqx.kernels._selective_scan import _tuning, fused
from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS, Spec

from . import _oracle
from ._harness import FULL, Contender, compiled, entries, race, with_gradients
from ._inputs import scan_inputs


_CHUNKS = {
    "cpu": (16, 32, 64, 128, 256),
    "pallas_tpu": (32, 64, 128, 256),
    "pallas_gpu": (16, 32),
}
_WORTH = 1.03


def main() -> int:
    """Measure, print, and write the table."""
    kernel = _backends.serving(fused.NAMES, None)
    kind = jax.devices()[0].device_kind
    costs = {chunk: 1.0 for chunk in _CHUNKS[kernel]}
    for spec in BENCHMARK_SPECS:
        medians = _medians(kernel, spec)
        for chunk, ms in medians.items():
            costs[chunk] *= ms ** (1 / len(BENCHMARK_SPECS))
            print(f"{kind} {kernel} {spec.name} chunk {chunk}: {ms:.2f} ms", flush=True)
    table = json.loads(_tuning.TABLE.read_text())
    now = _tuning.chunk_for(kernel, sys.maxsize)
    best = min(costs, key=costs.__getitem__)
    if costs.get(now, math.inf) <= _WORTH * costs[best]:
        best = now
    table.setdefault(kind, {})[kernel] = best
    _tuning.TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    print(f"{kind}: chunks of {best} tokens for {kernel}, in {_tuning.TABLE.name}")
    return 0


def _medians(kernel: str, spec: Spec) -> dict[int, float]:
    inputs = scan_inputs(*spec[1:])
    arguments = [jnp.asarray(x) for x in inputs.arguments]

    def prepare(chunk):
        def scan(u, delta, A, B, C, D):
            options = (None, None, False, None, None)
            return fused.selective_scan(
                kernel, u, delta, A, B, C, D, *options, chunk=chunk
            )[0]

        return compiled(with_gradients(scan, jnp.asarray(inputs.dy)), *arguments)

    contenders = [Contender(str(c), partial(prepare, c)) for c in _CHUNKS[kernel]]
    reference = partial(
        _oracle.selective_scan_gradients, *inputs.arguments, dy=inputs.dy
    )
    runners = entries(spec._asdict(), contenders, reference)
    found = race(FULL, "tune", "forward_backward", runners)
    return {int(m.implementation): m.median_ms or math.inf for m in found}


if __name__ == "__main__":
    sys.exit(main())
