"""The same plain scan of one row, its state laid out in two ways.

`channels_last` keeps the state as `(d_state, d_inner)`, `channels_first` as
`(d_inner, d_state)`. Nothing else differs.
"""

from collections.abc import Iterator
from functools import partial

import jax.numpy as jnp

from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS

from . import _oracle
from ._harness import Contender, Settings, compiled, entries, race
from ._inputs import ScanInputs, scan_inputs, scan_spec
from ._plain_scans import channels_first, channels_last
from ._records import Measurement


OPERATION = "selective_scan_layout"


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a layout and shape, forward."""
    shapes = [("tiny", 1, 32, 8, 4)] if settings.quick else _rows()
    for name, *sizes in shapes:
        inputs = scan_inputs(*sizes)
        runners = entries(
            scan_spec(name, *sizes),
            [
                Contender("channels_last", partial(_prepare, channels_last, inputs)),
                Contender("channels_first", partial(_prepare, channels_first, inputs)),
            ],
            partial(_expected, inputs),
        )
        yield from race(settings, OPERATION, "forward", runners)


def _rows() -> list[tuple[str, int, int, int, int]]:
    """The benchmark shapes, one row of each."""
    return [(f"{s.name}_1", 1, s.seq, s.d_inner, s.d_state) for s in BENCHMARK_SPECS]


def _prepare(scan, inputs: ScanInputs):
    u, delta, A, B, C, D = (jnp.asarray(x) for x in inputs.arguments)
    return compiled(scan, u[0], delta[0], A, B[0], C[0], D)


def _expected(inputs: ScanInputs):
    return _oracle.selective_scan(*inputs.arguments)[0]
