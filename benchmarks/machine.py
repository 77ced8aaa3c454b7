"""What this machine can do: the bandwidth of a copy, bytes read and bytes written.

The other half of the probe, exponentials and multiply-adds, stands beside the scans.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from . import probe
from ._environment import cores
from ._harness import Contender, Settings, entries, race
from ._records import Measurement


OPERATION = "copy"


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement for one thread, and one for as many as there are cores."""
    size = 2**16 if settings.quick else 2**28
    spec = {"name": f"{size >> 10}_kibibytes", "bytes_per_call": 2 * size}
    contenders = [
        Contender(probe.name(threads), partial(probe.copy, size, threads))
        for threads in sorted({1, cores()})
    ]
    runners = entries(spec, contenders, lambda: np.ones(()))
    yield from race(settings, OPERATION, "copy", runners)
