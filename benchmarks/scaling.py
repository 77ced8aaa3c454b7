"""The selective scan at lengths that double: linear time means a slope of one.

One row of 256 channels. What holds the states of all tokens takes part as long as they
fit. The slope is that of the least-squares line through the logarithms, from 2048
tokens on. On jax each call writes its results over those of the call before it: new
memory, as results of 32 MiB and more get at every call, the system would have to clear.
PyTorch allocates its results anew.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from . import _peers, _plain_scans
from ._harness import (
    Contender,
    Entry,
    Prepared,
    Settings,
    compiled_in_place,
    race,
)
from ._inputs import ScanInputs, scan_inputs, scan_spec
from ._records import Measurement
from .selective_scan import expected, library_scan


OPERATION = "selective_scan_scaling"

_D_INNER, _D_STATE = 256, 16
_LENGTHS = tuple(2**k for k in range(8, 18))

_JAX = {
    "cpu": library_scan("cpu"),
    "xla": library_scan("xla"),
    "plain_scan_rows": _plain_scans.plain_scan_rows,
    "associative_scan": _plain_scans.associative_scan,
}
_NAMES = (*_JAX, "mambapy_pscan")
# Tokens that what holds all states can read, forward and with gradients.
_LONGEST = {
    "plain_scan_rows": (None, 32768),
    "associative_scan": (16384, 8192),
    "mambapy_pscan": (16384, 8192),
}
_TOO_LONG = "it holds the states of all tokens: gigabytes, and seconds a call"


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, length and mode; all take turns."""
    lengths = (32, 64) if settings.quick else _LENGTHS
    if not settings.quick:
        # Many contenders, and a slope needs all lengths in the same spell of noise.
        settings = replace(settings, rounds=8, calls=4, turn_s=0.05, budget_s=5.0)
    for mode in ("forward", "forward_backward"):
        # By length: inputs and float64 outputs are kept of one length at a time.
        runners = [_entry(mode, seq, name) for seq in lengths for name in _NAMES]
        yield from race(settings, OPERATION, mode, runners)
    _expected.cache_clear()
    _inputs.cache_clear()


def _entry(mode: str, seq: int, name: str) -> Entry:
    longest = _LONGEST.get(name, (None, None))[mode != "forward"]
    left_out = _TOO_LONG if longest is not None and seq > longest else None
    spec = scan_spec(f"{seq}_tokens", *_sizes(seq))
    contender = Contender(name, functools.partial(_prepare, mode, seq, name), left_out)
    return Entry(spec, contender, functools.partial(_expected, mode, seq))


def _prepare(mode: str, seq: int, name: str) -> Prepared:
    inputs = _inputs(seq)
    dy = None if mode == "forward" else inputs.dy
    if name in _JAX:
        return compiled_in_place(_JAX[name], *inputs.arguments, cotangent=dy)
    return _peers.mambapy_pscan(inputs.arguments, dy)


def _sizes(seq: int) -> tuple[int, int, int, int]:
    return 1, seq, _D_INNER, _D_STATE


@functools.lru_cache(maxsize=1)
def _inputs(seq: int) -> ScanInputs:
    # On the device once, for all that read them.
    return jax.tree.map(jnp.asarray, scan_inputs(*_sizes(seq)))


@functools.lru_cache(maxsize=1)
def _expected(mode: str, seq: int):
    return expected(_inputs(seq), mode)
