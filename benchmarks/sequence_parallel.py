"""One sequence over eight devices: what each computes, and what it sends to the others.

The devices are virtual: they share the cores of one machine, so times say nothing of
several machines, and what is recorded for its own sake is the rest. *Updates* are the
elements that a device's passes over its piece compute forward, by formula (a
convolution's are multiply-adds). *Operations* are those on floating-point numbers in
the program that XLA compiled, loops counted as often as they run. An update takes
several, and gradients more, so what compares is the *share* of either: its part of the
same count on one device. *Sent* are the bytes of the operands of the collectives, by
formula and as compiled, of which the gradients have more. *Difference* is the largest
one from the plain operation on one device, in units of its largest value. The
implementation is `xla`.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capibara_eqx import kernels

from . import _oracle
from ._environment import ROOT, Load
from ._harness import (
    Settings,
    compile_timed,
    max_error,
    temp_bytes,
    with_gradients,
)
from ._inputs import normal, scan_inputs
from ._operations import operations
from ._records import Measurement


OPERATION = "sequence_parallel"

DEVICES = 8
MODES = ("forward", "forward_backward")
_FLAG = f"--xla_force_host_platform_device_count={DEVICES}"
_FLOAT = 4
_WIDTH = 4


class Subject(NamedTuple):
    """An operation with its inputs.

    - `plain`, `sharded`: of `arguments`; the latter takes a mesh and an axis, too.
    - `whole`: which arguments have no sequence.
    - `exact`: the first result in float64.
    - `updates`: elements that one pass computes.
    - `gathered`, `passed`, `summed`: numbers that a device hands to an all-gather, a
        collective permutation and an all-reduce.
    """

    plain: Callable[..., Any]
    sharded: Callable[..., Any]
    sizes: dict[str, int]
    arguments: tuple[np.ndarray, ...]
    whole: tuple[int, ...]
    exact: Callable[..., np.ndarray]
    updates: int
    passes: int
    gathered: int
    passed: int
    summed: int


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an operation, number of devices and mode."""
    before = Load.now()
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.sequence_parallel",
            *(["--quick"] if settings.quick else []),
        ],
        cwd=ROOT,
        # The flag that comes last counts.
        env={**os.environ, **environment, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    load = None if before is None else before.of_others(Load.now())
    # Libraries may print, and the numbers come last.
    for measured in json.loads(child.stdout.splitlines()[-1]):
        yield Measurement(OPERATION, load_of_others=load, **measured)


def sent_bytes(program: str, devices: int) -> int:
    """Bytes that one device hands to the collectives of a compiled program.

    **Arguments:**

    - `program`: the text of its HLO, which names the shapes of results.
    - `devices`: how many take part: a gathered result has the operands of all.
    """
    found = 0
    for line in program.splitlines():
        match = _COLLECTIVE.search(line)
        if match is not None:
            results, kind = match.groups()
            size = sum(
                _SIZES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
                for dtype, shape in _SHAPE.findall(results)
            )
            if kind == "all-gather":
                size //= devices
            elif kind == "reduce-scatter":
                size *= devices
            found += size
    return found


_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf" = (.+?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|s32|u32|bf16|f32|f64)\[([\d,]*)\]")
_SIZES = {"pred": 1, "s32": 4, "u32": 4, "bf16": 2, "f32": 4, "f64": 8}


def subjects(quick: bool) -> dict[str, Subject]:
    """What is measured, by name."""
    seq = 64 if quick else 8192
    wide, narrow = (8, 4) if quick else (1024, 16)
    return {
        "linear_recurrence": _recurrence(1, seq, wide),
        "selective_scan": _scan(1, seq, wide // 2, narrow),
        "ssd": _dual(1, seq, wide // 8, 8, narrow),
        "causal_conv": _convolution(1, seq, wide),
    }


def _recurrence(batch: int, seq: int, d: int) -> Subject:
    x, decay = normal(1, *[(batch, seq, d)] * 2)
    a = np.asarray(np.exp(-0.1 * np.abs(decay)), np.float32)
    return Subject(
        kernels.linear_recurrence,
        kernels.sharded_linear_recurrence,
        {"batch": batch, "seq": seq, "d": d},
        (a, x),
        (),
        _oracle.linear_recurrence,
        updates=batch * seq * d,
        passes=2,
        gathered=2 * batch * d,
        passed=0,
        summed=batch * d,
    )


def _scan(batch: int, seq: int, d_inner: int, d_state: int) -> Subject:
    inputs = scan_inputs(batch, seq, d_inner, d_state)
    state = batch * d_inner * d_state
    return Subject(
        kernels.selective_scan,
        kernels.sharded_selective_scan,
        {"batch": batch, "seq": seq, "d_inner": d_inner, "d_state": d_state},
        inputs.arguments,
        (2, 5),
        _oracle.selective_scan,
        updates=seq * state,
        passes=2,
        gathered=state + batch * d_inner,
        passed=0,
        summed=state,
    )


def _dual(batch: int, seq: int, n_heads: int, head_dim: int, d_state: int) -> Subject:
    x, B, C, steps = normal(
        2,
        (batch, seq, n_heads, head_dim),
        *[(batch, seq, 1, d_state)] * 2,
        (batch, seq, n_heads),
    )
    steps = np.asarray(0.1 * np.abs(steps), np.float32)
    state = batch * n_heads * head_dim * d_state
    sizes = {"n_heads": n_heads, "head_dim": head_dim, "d_state": d_state}
    return Subject(
        _by_steps(kernels.ssd),
        _by_steps(kernels.sharded_ssd),
        {"batch": batch, "seq": seq, **sizes},
        (x, steps, B, C),
        (),
        _exact_dual,
        updates=seq * state,
        passes=2,
        gathered=state + batch * n_heads,
        passed=0,
        summed=state,
    )


def _exact_dual(x, steps, B, C):
    """As a selective scan: the matrices of all tokens would take minutes."""
    channels = x.shape[2] * x.shape[3]
    y = _oracle.selective_scan(
        x.reshape(*x.shape[:2], channels),
        np.repeat(steps, x.shape[3], axis=2),
        -np.ones((channels, B.shape[-1])),
        B[:, :, 0],
        C[:, :, 0],
        np.zeros(channels),
    )
    return y.reshape(x.shape)


def _by_steps(dual):
    def run(x, steps, B, C, **options):
        return dual(x, -steps, B, C, coefficient=steps, **options)

    return run


def _convolution(batch: int, seq: int, channels: int) -> Subject:
    x, weight, bias = normal(
        3, (batch, seq, channels), (channels, 1, _WIDTH), (channels,)
    )
    reach = batch * (_WIDTH - 1) * channels
    return Subject(
        functools.partial(kernels.causal_conv, groups=channels),
        functools.partial(kernels.sharded_causal_conv, groups=channels),
        {"batch": batch, "seq": seq, "channels": channels, "width": _WIDTH},
        (x, weight, bias),
        (1, 2),
        _oracle.causal_conv,
        updates=batch * seq * channels * _WIDTH,
        passes=1,
        gathered=0,
        passed=reach,
        summed=reach,
    )


def _run(quick: bool) -> list[dict[str, Any]]:
    found = []
    for name, subject in subjects(quick).items():
        for mode in MODES:
            alone = None
            for devices in (1, DEVICES):
                record, outputs = _measured(name, subject, mode, devices, quick)
                spec = record["spec"]
                alone = (spec, outputs) if alone is None else alone
                difference = max_error(outputs, jax.tree.map(np.float64, alone[1]))
                spec["difference"] = float(f"{difference:.3g}")
                for work in ("updates", "operations"):
                    spec[f"{work}_share"] = round(spec[work] / alone[0][work], 4)
                found.append(record)
    return found


def _measured(name: str, subject: Subject, mode: str, devices: int, quick: bool):
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))
    arguments = _placed(subject, mesh)
    function = _function(subject, mode, mesh)
    executable, compile_ms = compile_timed(function, *arguments)
    times = []
    for _ in range(2 if quick else 6):
        start = time.perf_counter()
        outputs = jax.block_until_ready(executable(*arguments))
        times.append(round((time.perf_counter() - start) * 1e3, 4))
    outputs = jax.tree.map(np.asarray, outputs)
    y = jax.tree.leaves(outputs)[0]
    error = max_error(y, subject.exact(*subject.arguments))
    passes = 1 if devices == 1 else subject.passes
    spec = {
        "name": f"{name}_{devices}",
        **subject.sizes,
        "devices": devices,
        "updates": passes * subject.updates // devices,
        "sent_by_formula": _formula(subject, devices) if mode == "forward" else None,
        "sent_compiled": sent_bytes(executable.as_text(), devices),
        "operations": operations(executable.as_text()),
    }
    return {
        "implementation": "plain" if devices == 1 else "sharded",
        "spec": spec,
        "mode": mode,
        "compile_ms": round(compile_ms, 1),
        "evaluation_ms": times,
        "median_ms": round(float(np.median(times)), 4),
        "temp_bytes": temp_bytes(executable),
        "max_error": float(f"{error:.3g}"),
    }, outputs


def _placed(subject: Subject, mesh: Mesh) -> list[jax.Array]:
    specs = [
        P() if index in subject.whole else P(None, "seq")
        for index in range(len(subject.arguments))
    ]
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(subject.arguments, specs, strict=True)
    ]


def _function(subject: Subject, mode: str, mesh: Mesh) -> Callable[..., Any]:
    run = functools.partial(subject.plain, implementation="xla")
    if mesh.size > 1:
        sharded = functools.partial(subject.sharded, mesh=mesh, axis="seq")
        run = functools.partial(sharded, implementation="xla")
    if mode == "forward":
        return run

    def value_and_gradients(*arguments):
        # The cotangent of `y` is the first input, which has its shape; the state has
        # none, as in training.
        return with_gradients(lambda *a: run(*a)[0], arguments[0])(*arguments)

    return value_and_gradients


def _formula(subject: Subject, devices: int) -> int:
    numbers = subject.gathered + subject.passed + subject.summed
    return 0 if devices == 1 else _FLOAT * numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    print(json.dumps(_run(parser.parse_args().quick)))
