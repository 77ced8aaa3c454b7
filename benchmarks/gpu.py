"""The fused kernels on an NVIDIA GPU, beside the plain XLA form and the roofline.

Only where jax runs on such a GPU; elsewhere nothing is compiled and nothing recorded.
Times are of calls in a row (`_chain`), which leaves out what Python takes to ask for
them. `backward` is the pullback alone, from what forward kept, `forward_backward` is
both in one program.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# No part of the public interface.
from capibara_eqx.kernels import _backends
from capibara_eqx.kernels._causal_conv.specs import BENCHMARK_SPECS as CONV_SPECS
from capibara_eqx.kernels._causal_conv.specs import Spec as ConvSpec
from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS as SCAN_SPECS
from capibara_eqx.kernels._selective_scan.specs import Spec as ScanSpec

from . import _roofline
from ._chain import chained
from ._gpu_cases import (
    BACKWARD,
    BOTH,
    CONV,
    SCAN,
    STEP,
    Case,
    conv_case,
    scan_case,
    step_case,
)
from ._harness import (
    Contender,
    Entry,
    Prepared,
    Settings,
    entries,
    race,
    with_gradients,
)
from ._records import MEASURED, Measurement


IMPLEMENTATIONS = ("pallas_gpu", "xla")

_HOW = """\
`roofline` is the least time that the chip needs for the bytes, the exponentials or the
multiply-adds of the mode, whichever takes longest (`benchmarks/_roofline.py`), bytes at
the bandwidth of `copy` beside it. `empty_loop` is what the timing itself takes a call.
Operands that fit in the chip's cache stay there from call to call, as between layers;
then bytes cost less than the roofline says. *Error* is judged on a part of the results
(`benchmarks/_gpu_cases.py`): bfloat16 ones are rounded to 8 bits, which alone makes an
error of up to 4e-3.
"""
HEADINGS = {
    SCAN: f"""\
The selective scan on a GPU, as a Mamba layer calls it.

Streams in bfloat16, weights in float32, with softplus, bias, skip weights and gate.
{_HOW}""",
    CONV: """\
The depthwise convolution with bias and SiLU on a GPU, in bfloat16.

Measured as the scan on a GPU is.
""",
    STEP: """\
The selective scan over one token on a GPU, its state in float32.

Streams in bfloat16; measured as the scan on a GPU is. So short a kernel takes about as
long to start as to run.
""",
}

# A layer of Mamba-130m over a batch that fills a GPU: the shape of the claims.
_SCANS = (ScanSpec("mamba_130m_batch", 8, 4096, 1536, 16), *SCAN_SPECS)
_CONVS = (
    ConvSpec("mamba_130m_batch", 8, 4096, 1536, 1536, 4, groups=1536),
    *CONV_SPECS,
)
_QUICK_SCANS = (ScanSpec("tiny", 2, 40, 8, 4),)
_QUICK_CONVS = (ConvSpec("tiny", 2, 24, 6, 6, 4, groups=6),)

# Of the array that is copied: many times what the caches hold.
_COPIED_BYTES = 2**30
_ROUNDS = 6
_AT_LEAST_S = 0.05
_QUICK_AT_LEAST_S = 0.001


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a contender, shape and mode, or none without a GPU."""
    platform = _backends.platform()
    if platform != "cuda":
        print(f"  left out: needs an NVIDIA GPU, and jax runs on {platform}")
        return
    yield from compare(settings, IMPLEMENTATIONS)


def compare(
    settings: Settings, implementations: Sequence[str]
) -> Iterator[Measurement]:
    """`measure` on any platform, for the implementations that it has.

    **Arguments:**

    - `settings`: `quick` makes all shapes tiny.
    - `implementations`: of the library.
    """
    quick = settings.quick
    for spec in _QUICK_SCANS if quick else _SCANS:
        yield from _races(settings, scan_case(spec), implementations)
    for spec in _QUICK_CONVS if quick else _CONVS:
        yield from _races(settings, conv_case(spec), implementations)
    d_inner, d_state = (8, 4) if quick else (1536, 16)
    for batch in (2,) if quick else (1, 8):
        case = step_case(batch, d_inner, d_state)
        yield from _races(settings, case, implementations)


def _races(settings, case: Case, implementations):
    # Each time is already the mean of many calls.
    settings = replace(settings, rounds=min(settings.rounds, _ROUNDS))
    at_least_s = _QUICK_AT_LEAST_S if settings.quick else _AT_LEAST_S
    for mode, passes in case.work.items():
        contenders = [
            Contender(name, partial(prepare, case, name, mode, at_least_s))
            for name in implementations
        ]
        runners = entries(case.spec, contenders, partial(case.expected, mode))
        runners += _yardsticks(case.spec, settings.quick, at_least_s)
        found = race(settings, case.operation, mode, runners)
        yield from with_roofline(found, passes, jax.devices()[0].device_kind)


def prepare(case: Case, implementation: str, mode: str, at_least_s: float) -> Prepared:
    """A chain of calls of one mode, and what of its results is judged."""
    function = case.function(implementation)
    arguments = [jnp.asarray(x) for x in case.arguments]
    dy = None if case.cotangent is None else jnp.asarray(case.cotangent)
    if mode == BACKWARD:
        _, pullback = jax.jit(partial(jax.vjp, function))(*arguments)
        timed, arguments = lambda pullback, dy: pullback(dy), [pullback, dy]
    elif mode == BOTH:
        timed = lambda dy, *arguments: with_gradients(function, dy)(*arguments)
        arguments = [dy, *arguments]
    else:
        timed = function
    prepared = chained(timed, *arguments, at_least_s=at_least_s)
    return replace(prepared, outputs=partial(case.judged, mode))


def _yardsticks(spec: dict[str, Any], quick: bool, at_least_s: float) -> list[Entry]:
    """A copy of an array, and a chain of nothing; both yield what they are given."""
    size = 2**14 if quick else _COPIED_BYTES
    chain = partial(chained, at_least_s=at_least_s)

    def copy():
        x = jnp.full(size // 4, 2.0, jnp.float32)
        # A factor of one that XLA does not know: it would take a mere copy away.
        prepared = chain(lambda x, factor: x * factor, x, jnp.ones(()))
        extremes = lambda x: jnp.stack([jnp.min(x), jnp.max(x)])
        return replace(prepared, outputs=extremes)

    return [
        Entry(
            spec | {"bytes_per_call": 2 * size},
            Contender("copy", copy),
            partial(np.full, 2, 2.0),
        ),
        Entry(
            spec,
            Contender("empty_loop", partial(chain, lambda x: x, jnp.ones(()))),
            partial(np.ones, ()),
        ),
    ]


def with_roofline(
    found: Sequence[Measurement],
    passes: Sequence[_roofline.Work],
    device_kind: str,
) -> list[Measurement]:
    """The measurements of a race, those of the library with their roofline.

    **Arguments:**

    - `found`: of one race, the copy among them.
    - `passes`: the work of each.
    - `device_kind`: as jax names it.
    """
    (copy,) = (m for m in found if m.implementation == "copy")
    if copy.median_ms is None:
        raise ValueError(f"there is no bandwidth without a copy: {copy.reason}")
    bytes_per_s = copy.spec["bytes_per_call"] / copy.median_ms * 1e3
    rates = _roofline.rates(device_kind, bytes_per_s)
    if rates is None:
        ms, why = None, f"the rates of {device_kind} are not in the table"
    else:
        ms, why = _roofline.roofline(passes, rates)
        ms = float(f"{ms:.5g}")
    return [
        replace(m, roofline_ms=ms, roofline_of=why)
        if m.implementation in IMPLEMENTATIONS and m.status == MEASURED
        else m
        for m in found
    ]
