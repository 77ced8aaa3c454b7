"""Contenders take turns, so that the noise of a shared machine hits all alike."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._environment import Load
from ._records import LEFT_OUT, MISSING, Measurement


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    `rounds` turns a contender, each of at most `calls` calls and about `turn_s`
    seconds; a contender that has used `budget_s` seconds takes no further turn.
    """

    quick: bool = False
    rounds: int = 12
    calls: int = 8
    turn_s: float = 0.25
    budget_s: float = 12.0


# The longest call that is made once more in each turn, without being counted.
_UNCOUNTED_S = 1.0

QUICK = Settings(quick=True, rounds=3, calls=3, turn_s=0.05, budget_s=1.0)
FULL = Settings()


@dataclass(frozen=True)
class Prepared:
    """A contender ready to be timed: `run` returns when its result is there.

    `calls` is how often `run` does its work; what is recorded is the mean of them.
    """

    run: Callable[[], Any]
    compile_ms: float | None = None
    temp_bytes: int | None = None
    # From the result of `run`, what the reference judges; that result itself if None.
    outputs: Callable[[Any], Any] | None = None
    calls: int = 1


class Absent(Exception):
    """The package of a peer is not installed, or not in a version that fits."""


class TooLarge(Exception):
    """A contender, compiled, needs more memory than it may have."""


@dataclass(frozen=True)
class Contender:
    """An implementation under the name it is recorded by."""

    implementation: str
    prepare: Callable[[], Prepared]
    left_out: str | None = None


def compiled(
    function: Callable[..., Any], *args: Any, cotangent: Any = None
) -> Prepared:
    """`function` of fixed arguments, compiled by jax ahead of time.

    With a `cotangent` its result is `(value, gradients)`.
    """
    timed = function
    if cotangent is not None:
        # An argument: a long constant would be compiled with the program.
        timed = lambda dy, *args: with_gradients(function, dy)(*args)
        args = (jnp.asarray(cotangent), *args)
    executable, compile_ms = compile_timed(timed, *args)
    return Prepared(
        lambda: jax.block_until_ready(executable(*args)),
        compile_ms,
        temp_bytes(executable),
    )


def compiled_in_place(
    function: Callable[..., Any], *args: Any, cotangent: Any = None
) -> Prepared:
    """`compiled`, but each call writes its results over those of the call before it.

    So do the operations of a longer program. Where a call gets new memory, the system
    has to clear all of it, in which nothing of what is compared takes part.
    """
    timed = lambda old, *args: function(*args)
    if cotangent is not None:
        timed = lambda old, dy, *args: with_gradients(function, dy)(*args)
        args = (jnp.asarray(cotangent), *args)
    results = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(timed, None, *args)
    )
    executable, compile_ms = compile_timed(timed, results, *args, donate=(0,))

    def run():
        nonlocal results
        results = jax.block_until_ready(executable(results, *args))
        return results

    return Prepared(run, compile_ms, temp_bytes(executable))


def compile_timed(
    function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
) -> tuple[Any, float]:
    """The executable of `function` for such arguments, and the milliseconds it took."""
    start = time.perf_counter()
    # What is donated need not be read: its memory is used.
    jitted = jax.jit(function, donate_argnums=donate, keep_unused=bool(donate))
    executable = jitted.lower(*args).compile()
    return executable, (time.perf_counter() - start) * 1e3


def temp_bytes(executable: Any) -> int | None:
    """What the executable allocates beside its arguments and results."""
    analysis = executable.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def with_gradients(function: Callable[..., Any], cotangent: Any) -> Callable[..., Any]:
    """`function` with its vector-Jacobian product: `(value, gradients)`."""

    def value_and_gradients(*args):
        value, pullback = jax.vjp(function, *args)
        return value, pullback(cotangent)

    return value_and_gradients


def max_error(outputs: Any, reference: Any) -> float:
    """Largest difference, in units of the largest value of the output it is in."""
    got = jax.tree.leaves(outputs)
    expected = jax.tree.leaves(reference)
    if len(got) != len(expected):
        raise ValueError(f"{len(got)} outputs, but the reference has {len(expected)}.")
    errors = []
    for value, exact in zip(got, expected, strict=True):
        value = np.asarray(value, np.float64)
        if value.shape != exact.shape:
            raise ValueError(f"output of shape {value.shape}, not {exact.shape}.")
        errors.append(np.max(np.abs(value - exact)) / np.max(np.abs(exact)))
    # A maximum of Python's would let a NaN pass.
    return float(np.max(errors))


@dataclass(frozen=True)
class Entry:
    """A contender, the shape it runs at, and what gives its float64 outputs."""

    spec: dict[str, Any]
    contender: Contender
    reference: Callable[[], Any]


def entries(
    spec: dict[str, Any], contenders: Sequence[Contender], reference: Callable[[], Any]
) -> list[Entry]:
    """Contenders at one shape; the reference is computed once, and only if needed."""
    shared = functools.cache(reference)
    return [Entry(spec, contender, shared) for contender in contenders]


def race(
    settings: Settings, operation: str, mode: str, entries: Sequence[Entry]
) -> list[Measurement]:
    """Time the entries in turns.

    **Arguments:**

    - `settings`: how long.
    - `operation`, `mode`: what the records say.
    - `entries`: who takes part.

    **Returns:**

    One measurement an entry, in their order, also of those that took no part.
    """
    lanes = [_Lane(operation, mode, entry) for entry in entries]
    before = Load.now()
    for lane in lanes:
        lane.enter(settings)
    for turn in range(settings.rounds):
        # Everybody follows everybody else in turn.
        shift = turn % len(lanes)
        for lane in lanes[shift:] + lanes[:shift]:
            lane.turn(settings)
    load = None if before is None else before.of_others(Load.now())
    return [lane.result(load) for lane in lanes]


class _Lane:
    def __init__(self, operation: str, mode: str, entry: Entry):
        self.entry = entry
        self.measurement = Measurement(
            operation, entry.contender.implementation, entry.spec, mode
        )
        self.prepared: Prepared | None = None
        self.times: list[float] = []

    def enter(self, settings: Settings) -> None:
        """Prepare, judge the first result, and take that call as a warm-up."""
        contender = self.entry.contender
        if contender.left_out is not None:
            self._out(LEFT_OUT, contender.left_out)
            return
        try:
            prepared = contender.prepare()
        except (Absent, NotImplementedError) as absence:
            # The latter: an implementation of the library that cannot serve here.
            self._out(MISSING, str(absence))
            return
        except TooLarge as size:
            self._out(LEFT_OUT, str(size))
            return
        self.prepared = prepared
        start = time.perf_counter()
        outputs = prepared.run()
        first = time.perf_counter() - start
        # So slow that a second call would tell little more than the first did.
        if first > settings.budget_s:
            self.times.append(first)
        if prepared.outputs is not None:
            outputs = prepared.outputs(outputs)
        self.measurement = replace(
            self.measurement,
            compile_ms=_rounded(prepared.compile_ms),
            temp_bytes=prepared.temp_bytes,
            max_error=float(f"{max_error(outputs, self.entry.reference()):.3g}"),
        )

    def turn(self, settings: Settings) -> None:
        if self.prepared is None or sum(self.times) > settings.budget_s:
            return
        run = self.prepared.run
        # The threads of the contender before are still spinning, its data are in the
        # caches, and memory that it has freed is gone: one call that does not count,
        # where that is not long.
        time.sleep(0.02)
        if not self.times or self.times[-1] < _UNCOUNTED_S:
            run()
        start = time.perf_counter()
        for _ in range(settings.calls):
            before = time.perf_counter()
            run()
            after = time.perf_counter()
            self.times.append(after - before)
            if after - start > settings.turn_s:
                break

    def result(self, load: float | None) -> Measurement:
        if self.prepared is None:
            return self.measurement
        times = [t * 1e3 / self.prepared.calls for t in self.times]
        return replace(
            self.measurement,
            evaluation_ms=[_rounded(t) for t in times],
            median_ms=_rounded(statistics.median(times)),
            load_of_others=load,
        )

    def _out(self, status: str, reason: str) -> None:
        self.measurement = replace(self.measurement, status=status, reason=reason)


def _rounded(value: Any) -> Any:
    return None if value is None else float(f"{value:.5g}")
