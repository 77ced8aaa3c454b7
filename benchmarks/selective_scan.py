"""The selective scan, forward and with the gradients of all six inputs.

`xla` and `reference` are the library's. `plain_scan` is a `jax.lax.scan` over the batch
with channels on the last axis, as one would write it at first; `plain_scan_rows` is the
same with a batch axis of one row dropped, one of the tricks that make the library fast.
Neither recomputes anything. `associative_scan` is JAX's. `mambapy_pscan` and
`transformers_scan` run on PyTorch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from capibara_eqx.kernels import selective_scan

# The named shapes are shared with the tests; they are no part of the public interface.
from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS, Spec

from . import _oracle, _peers, _plain_scans
from ._harness import Contender, Settings, compiled, entries, race, with_gradients
from ._inputs import ScanInputs, scan_inputs
from ._records import Measurement


OPERATION = "selective_scan"

_QUICK = (Spec("tiny", 2, 48, 8, 4),)

# transformers slices the states of all tokens once a token, and the derivative of each
# slice is as large as all of them: its backward pass is quadratic in the length.
_LONGEST_QUADRATIC = 1024
_QUADRATIC = (
    "its backward pass takes time quadratic in the length: minutes a call at this shape"
)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        inputs = scan_inputs(*spec[1:])
        for mode, backward in (("forward", False), ("forward_backward", True)):
            runners = entries(
                spec._asdict(),
                _contenders(inputs, backward),
                partial(_expected, inputs, backward),
            )
            yield from race(settings, OPERATION, mode, runners)


def library_scan(implementation: str) -> Callable[..., Any]:
    """`kernels.selective_scan` by one implementation, returning `y` alone."""

    def scan(*inputs):
        return selective_scan(*inputs, implementation=implementation)[0]

    return scan


def _contenders(inputs: ScanInputs, backward: bool) -> Sequence[Contender]:
    scans = {
        "xla": library_scan("xla"),
        "reference": library_scan("reference"),
        "plain_scan": _plain_scans.plain_scan,
        "plain_scan_rows": _plain_scans.plain_scan_rows,
        "associative_scan": _plain_scans.associative_scan,
    }
    arguments = tuple(jnp.asarray(x) for x in inputs.arguments)

    def prepare(scan):
        if backward:
            scan = with_gradients(scan, jnp.asarray(inputs.dy))
        return compiled(scan, *arguments)

    ours = [Contender(name, partial(prepare, scan)) for name, scan in scans.items()]
    dy = inputs.dy if backward else None
    seq = inputs.dy.shape[1]
    peers = [
        Contender("mambapy_pscan", partial(_peers.mambapy_pscan, inputs.arguments, dy)),
        Contender(
            "transformers_scan",
            partial(_peers.transformers_scan, inputs.arguments, dy),
            left_out=_QUADRATIC if backward and seq > _LONGEST_QUADRATIC else None,
        ),
    ]
    return ours + peers


def _expected(inputs: ScanInputs, backward: bool) -> Any:
    if backward:
        return _oracle.selective_scan_gradients(*inputs.arguments, dy=inputs.dy)
    return _oracle.selective_scan(*inputs.arguments)
