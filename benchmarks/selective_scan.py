"""The selective scan, forward and with the gradients of all six inputs.

`cpu`, `xla` and `reference` are the library's, the first in C++ and the default on a
CPU. `plain_scan` is a `jax.lax.scan` over the batch with channels on the last axis, as
one would write it at first; `plain_scan_rows` is the same with a batch axis of one row
dropped. Neither recomputes anything. `associative_scan` is JAX's. `mambapy_pscan` and
`transformers_scan` run on PyTorch. `probe` does the exponentials and the multiply-adds
of the forward pass and nothing else, in C++ on every core: no load, no store.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from capibara_eqx.kernels import selective_scan

# The named shapes are shared with the tests; they are no part of the public interface.
from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS, Spec

from . import _oracle, _peers, _plain_scans, probe
from ._environment import cores
from ._harness import (
    Contender,
    Entry,
    Prepared,
    Settings,
    compiled,
    entries,
    race,
)
from ._inputs import ScanInputs, scan_inputs
from ._records import Measurement


OPERATION = "selective_scan"

# The implementations of the library that a CPU can run at speed.
LIBRARY = ("cpu", "xla", "reference")
# One row of a real layer: the shape of the claims about the compiled scan.
ROW = BENCHMARK_SPECS[1]
_QUICK = (Spec("tiny", 2, 48, 8, 4),)

# transformers slices the states of all tokens once a token, and the derivative of each
# slice is as large as all of them: its backward pass is quadratic in the length.
_LONGEST_QUADRATIC = 1024
QUADRATIC = (
    "its backward pass takes time quadratic in the length: minutes a call at this shape"
)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        inputs = scan_inputs(*spec[1:])
        for mode in ("forward", "forward_backward"):
            runners = entries(
                spec._asdict(),
                [*_ours(inputs, mode), *_theirs(inputs, mode)],
                partial(expected, inputs, mode),
            )
            yield from race(settings, OPERATION, mode, [*runners, _probe(spec)])


def library_scan(implementation: str) -> Callable[..., Any]:
    """`kernels.selective_scan` by one implementation, returning `y` alone."""

    def scan(*inputs):
        return selective_scan(*inputs, implementation=implementation)[0]

    return scan


def prepare(scan: Callable[..., Any], inputs: ScanInputs, mode: str) -> Prepared:
    """A function of the six inputs, compiled, with its gradients if `mode` says so."""
    dy = None if mode == "forward" else inputs.dy
    return compiled(scan, *(jnp.asarray(x) for x in inputs.arguments), cotangent=dy)


def prepare_library(implementation: str, inputs: ScanInputs, mode: str) -> Prepared:
    """`prepare` for an implementation of the library."""
    return prepare(library_scan(implementation), inputs, mode)


def expected(inputs: ScanInputs, mode: str) -> Any:
    """The outputs of the mode in float64."""
    if mode == "forward_backward":
        return _oracle.selective_scan_gradients(*inputs.arguments, dy=inputs.dy)
    return _oracle.selective_scan(*inputs.arguments)


def _ours(inputs: ScanInputs, mode: str) -> list[Contender]:
    """The library's implementations, and what jax gives whoever writes their own."""
    scans = {
        **{name: library_scan(name) for name in LIBRARY},
        "plain_scan": _plain_scans.plain_scan,
        "plain_scan_rows": _plain_scans.plain_scan_rows,
        "associative_scan": _plain_scans.associative_scan,
    }
    return [
        Contender(name, partial(prepare, scan, inputs, mode))
        for name, scan in scans.items()
    ]


def _theirs(inputs: ScanInputs, mode: str) -> Sequence[Contender]:
    dy = None if mode == "forward" else inputs.dy
    too_long = inputs.dy.shape[1] > _LONGEST_QUADRATIC
    return [
        Contender("mambapy_pscan", partial(_peers.mambapy_pscan, inputs.arguments, dy)),
        Contender(
            "transformers_scan",
            partial(_peers.transformers_scan, inputs.arguments, dy),
            left_out=QUADRATIC if dy is not None and too_long else None,
        ),
    ]


def _probe(spec: Spec) -> Entry:
    threads = cores()
    work = partial(probe.scan_work, int(np.prod(spec[1:])), spec.d_state, threads)
    reference = partial(probe.scan_work_expected, threads)
    return Entry(spec._asdict(), Contender("probe", work), reference)
