"""The state space dual of Mamba-2, forward and with the gradients of all five inputs.

`cpu` (the default on a CPU), `xla` and `reference` are the library's; `xla_32` to
`xla_256` are the second in chunks of so many tokens instead of its own 64.
`transformers_scan` runs on PyTorch in chunks of 256, its default, and
`transformers_scan_64` in chunks of 64.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from capibara_eqx.kernels import ssd
from capibara_eqx.kernels._ssd.specs import BENCHMARK_SPECS, Spec

from . import _mamba2_peers, _ssd_oracle
from ._harness import Contender, Settings, compiled, entries, race
from ._records import Measurement


OPERATION = "ssd"

_QUICK = (Spec("tiny", 2, 40, 4, 4, 1, 8),)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        inputs, dy = ssd_inputs(spec)
        for mode in ("forward", "forward_backward"):
            cotangent = None if mode == "forward" else dy
            runners = entries(
                spec._asdict(),
                [*_ours(inputs, cotangent), *_theirs(inputs, cotangent)],
                partial(_expected, inputs, cotangent),
            )
            yield from race(settings, OPERATION, mode, runners)


def ssd_inputs(spec: Spec) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """`x, dt, A, B, C` as a layer has them at first, and a cotangent of `y`."""
    rng = np.random.default_rng(0)
    _, batch, seq, n_heads, head_dim, n_groups, d_state = spec
    steps = np.exp(rng.uniform(np.log(0.001), np.log(0.1), (batch, seq, n_heads)))
    arrays = (
        rng.normal(size=(batch, seq, n_heads, head_dim)),
        steps,
        -rng.uniform(1, 16, n_heads),
        rng.normal(size=(batch, seq, n_groups, d_state)),
        rng.normal(size=(batch, seq, n_groups, d_state)),
        rng.normal(size=(batch, seq, n_heads, head_dim)),
    )
    *inputs, dy = (np.asarray(array, np.float32) for array in arrays)
    return tuple(inputs), dy


def library_scan(**options: Any) -> Callable[..., Any]:
    """`kernels.ssd` of `x, dt, A, B, C`, returning `y` alone."""

    def scan(x, dt, A, B, C):
        return ssd(x, dt * A[None, None], B, C, coefficient=dt, **options)[0]

    return scan


def _ours(inputs, dy):
    names = ("cpu", "xla", "reference")
    scans = {name: library_scan(implementation=name) for name in names}
    for size in (32, 128, 256):
        scans[f"xla_{size}"] = library_scan(chunk_size=size, implementation="xla")
    arrays = [jnp.asarray(x) for x in inputs]
    for name, scan in scans.items():
        yield Contender(name, partial(compiled, scan, *arrays, cotangent=dy))


def _theirs(inputs, dy):
    for name, size in (("transformers_scan", 256), ("transformers_scan_64", 64)):
        prepare = partial(_mamba2_peers.transformers_ssd, inputs, dy, size)
        yield Contender(name, prepare)


def _expected(inputs, dy):
    if dy is None:
        return _ssd_oracle.ssd(*inputs)
    return _ssd_oracle.ssd_gradients(*inputs, dy=dy)
