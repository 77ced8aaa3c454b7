"""`python -m benchmarks.tune`: measure the block sizes of the scan on this device.

Writes the best into the library's table of tuned sizes, under the kind of the device.
Figures are medians of the forward pass with all gradients, taken in turns; sizes that
are in use stay the best unless others gain more than `_WORTH`: less is noise.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp

# What is tuned is no part of the public interface.
from capibara_eqx.kernels import _backends
from capibara_eqx.kernels._selective_scan import _tuning, fused
from capibara_eqx.kernels._selective_scan._tuning import Sizes
from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS, Spec

from . import _oracle
from ._harness import FULL, Contender, compiled, entries, race
from ._inputs import scan_inputs


# What is tried: every choice of the one with every choice of the others.
_CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"chunk": (16, 32, 64, 128, 256)},
    "pallas_tpu": {"chunk": (32, 64, 128, 256), "tile": (128, 256, 512, 1024)},
    "pallas_gpu": {"chunk": (8, 16, 32), "group": (8, 16), "stages": (1, 2, 3)},
}
_WORTH = 1.03


def main() -> int:
    """Measure, print, and write the table."""
    kernel, kind = _backends.serving(fused.NAMES, None), _backends.device_kind()
    now = _tuning.sizes_for(kernel, sys.maxsize)
    costs = dict.fromkeys([now, *candidates(kernel)], 1.0)
    for spec in BENCHMARK_SPECS:
        for sizes, ms in _medians(kernel, spec, list(costs)).items():
            costs[sizes] *= ms ** (1 / len(BENCHMARK_SPECS))
            print(f"{kind} {kernel} {spec.name} {words(sizes)}: {ms:.2f} ms")
    best = better(costs, now)
    table = json.loads(_tuning.TABLE.read_text())
    table.setdefault(kind, {})[kernel] = given(best)
    _tuning.TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    print(f"{kind} {kernel}: {words(best)}, in {_tuning.TABLE.name}")
    return 0


def candidates(kernel: str) -> Iterator[Sizes]:
    """All sizes that are tried for a kernel."""
    choices = _CHOICES[kernel]
    for values in itertools.product(*choices.values()):
        yield Sizes(**dict(zip(choices, values, strict=True)))


def better(costs: dict[Sizes, float], now: Sizes) -> Sizes:
    """The sizes of the least cost, or those in use if the gain is not worth a change.

    **Raises:**

    `RuntimeError` if none could be measured.
    """
    best = min(costs, key=costs.__getitem__)
    if not math.isfinite(costs[best]):
        raise RuntimeError("tune: no block sizes could be measured on this device.")
    return now if costs[now] <= _WORTH * costs[best] else best


def given(sizes: Sizes) -> dict[str, int]:
    """The sizes that do not follow a rule, by name."""
    return {name: size for name, size in sizes._asdict().items() if size is not None}


def words(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in given(sizes).items())


def _medians(kernel: str, spec: Spec, tried: list[Sizes]) -> dict[Sizes, float]:
    inputs = scan_inputs(*spec[1:])
    arguments = [jnp.asarray(x) for x in inputs.arguments]

    def prepare(sizes):
        def scan(u, delta, A, B, C, D):
            options = (None, None, False, None, None)
            return fused.selective_scan(
                kernel, u, delta, A, B, C, D, *options, sizes=sizes
            )[0]

        return compiled(scan, *arguments, cotangent=inputs.dy)

    contenders = [Contender(words(sizes), partial(prepare, sizes)) for sizes in tried]
    reference = partial(
        _oracle.selective_scan_gradients, *inputs.arguments, dy=inputs.dy
    )
    runners = entries(spec._asdict(), contenders, reference)
    found = race(FULL, "tune", "forward_backward", runners)
    # What the kernel refuses has no time.
    return {
        sizes: m.median_ms or math.inf for sizes, m in zip(tried, found, strict=True)
    }


if __name__ == "__main__":
    sys.exit(main())
