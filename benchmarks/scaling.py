"""The selective scan at lengths that double: linear time means a ratio of two."""

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp

from . import _oracle
from ._harness import Contender, Entry, Settings, compiled, race, with_gradients
from ._inputs import scan_inputs, scan_spec
from ._records import Measurement
from .selective_scan import library_scan


OPERATION = "selective_scan_scaling"

_D_INNER, _D_STATE = 256, 16
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a length and mode; all lengths of a mode take turns."""
    lengths = (32, 64) if settings.quick else _LENGTHS
    if not settings.quick:
        # A ratio of neighbours needs both in the same spell of noise: short turns.
        settings = replace(settings, rounds=3 * settings.rounds, calls=4, turn_s=0.05)
    for mode in ("forward", "forward_backward"):
        runners = [_entry(mode, length) for length in lengths]
        yield from race(settings, OPERATION, mode, runners)


def _entry(mode: str, seq: int) -> Entry:
    sizes = (1, seq, _D_INNER, _D_STATE)

    def prepare():
        inputs = scan_inputs(*sizes)
        scan = library_scan("xla")
        if mode == "forward_backward":
            scan = with_gradients(scan, jnp.asarray(inputs.dy))
        return compiled(scan, *(jnp.asarray(x) for x in inputs.arguments))

    def expected():
        inputs = scan_inputs(*sizes)
        if mode == "forward_backward":
            return _oracle.selective_scan_gradients(*inputs.arguments, dy=inputs.dy)
        return _oracle.selective_scan(*inputs.arguments)

    return Entry(
        scan_spec(f"{seq}_tokens", *sizes), Contender("xla", prepare), expected
    )
