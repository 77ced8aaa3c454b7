import math
import time
from collections.abc import Callable
from typing import NamedTuple

from ._checkpoint import Checkpointer, CheckpointError
from ._run import RunFolder
from ._step import TrainState
from ._trainer import Trainer


# Lines of metrics.jsonl are means over this many steps.
_LOG_EVERY = 10


class NonFiniteLossError(ArithmeticError):
    """Training met a loss or a gradient that is not a number."""


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""

    def __init__(self, step: int):
        super().__init__(f"Training was interrupted after step {step}.")
        self.step = step


class Progress(NamedTuple):
    """Where a run is. Times are in seconds, the loss in bits a byte and in nats."""

    step: int
    share: float
    loss: float
    bits_per_byte: float
    tokens_per_second: float
    elapsed: float
    remaining: float


class TrainResult(NamedTuple):
    """The end of a run; times are of the whole run and leave compiling out."""

    state: TrainState
    step: int
    elapsed: float
    tokens_per_second: float


def train(
    trainer: Trainer,
    run: RunFolder,
    checkpoints: Checkpointer,
    *,
    report: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train from the newest checkpoint, or from the start, to the end of the run.

    The result does not depend on how often the run was stopped and continued, as far
    as it is bounded by steps; one bounded by seconds stops where the clock says.

    **Arguments:**

    - `trainer`: the run's steps.
    - `run`: where metrics are written.
    - `checkpoints`: of this run; one is written every `checkpoint_every` steps and at
        the end.
    - `report`: called after every step.
    - `should_stop`: asked after every step.

    **Returns:**

    `TrainResult(state, step, elapsed, tokens_per_second)`.

    **Raises:**

    `NonFiniteLossError`, with the last good checkpoint left as it is; `Interrupted`
    after a checkpoint if `should_stop` says so; `CheckpointError` if one cannot be
    written, or those that were written are gone; `ValueError` if metrics.jsonl is
    damaged.
    """
    state = trainer.init_state()
    start, before = 0, 0.0
    if checkpoints.latest_step() is not None:
        state, meta = checkpoints.restore(state)
        start, before = int(meta["step"]), float(meta["elapsed"])
    else:
        _check_none_is_lost(trainer, run)
    run.rewind_metrics(start)
    _compile(trainer, start)
    clock = _Clock(trainer, before)
    log = _Log(trainer, run, checkpoints, clock, report)
    step = start
    while not clock.finished(step):
        share = clock.share(step)
        state, metrics = trainer.step(state, step, share)
        step += 1
        # The step just begun runs while the numbers of the one before are read.
        log.add(step, share, metrics)
        stop = should_stop is not None and should_stop()
        if stop or (step % trainer.config.checkpoint_every == 0):
            log.flush()
            checkpoints.save(step, state, {"step": step, "elapsed": clock.elapsed()})
        if stop and not clock.finished(step):
            raise Interrupted(step)
    log.flush()
    elapsed = clock.elapsed()
    checkpoints.save(step, state, {"step": step, "elapsed": elapsed})
    # Of the whole run: one resumed at its end takes no step of its own.
    rate = step * trainer.tokens_per_step / max(elapsed, 1e-9)
    return TrainResult(state, step, elapsed, rate)


def _check_none_is_lost(trainer: Trainer, run: RunFolder) -> None:
    """A run that got past its first checkpoint is not begun again in silence."""
    metrics = run.read_metrics()
    reached = metrics[-1]["step"] if metrics else 0
    every = trainer.config.checkpoint_every
    if reached > every:
        raise CheckpointError(
            f"There is no checkpoint in {run.checkpoints_path}, but metrics.jsonl goes "
            f"to step {reached} and one was written every {every} steps: they were "
            "deleted or moved. Put them back, or start a new run with --out."
        )


def _compile(trainer: Trainer, number: int) -> None:
    """Run one step on a throw-away state, so that the clock leaves compiling out."""
    _, metrics = trainer.step(trainer.init_state(), number, 0.0)
    metrics["loss"].block_until_ready()


class _Clock:
    """How far a run is: by its steps, or by the seconds since it began."""

    def __init__(self, trainer: Trainer, before: float):
        self._steps = trainer.config.steps
        self._seconds = trainer.config.seconds
        self._begin = time.perf_counter() - before

    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def share(self, step: int) -> float:
        if self._steps is not None:
            return step / self._steps
        assert self._seconds is not None
        return min(self.elapsed() / self._seconds, 1.0)

    def finished(self, step: int) -> bool:
        return self.share(step) >= 1

    def remaining(self, share: float) -> float:
        if self._seconds is not None:
            return max(self._seconds - self.elapsed(), 0.0)
        return self.elapsed() * (1 - share) / share if share > 0 else math.inf


class _Log:
    """Reads the numbers of a step while the next one runs, checks and records them."""

    def __init__(self, trainer, run, checkpoints, clock, report):
        self._trainer = trainer
        self._run = run
        self._checkpoints = checkpoints
        self._clock = clock
        self._report = report
        self._pending = None
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._first: tuple[int, float] | None = None

    def add(self, step, share, metrics):
        pending, self._pending = self._pending, (step, share, metrics)
        if pending is not None:
            self._record(*pending)

    def flush(self):
        """Record everything up to the last step, so that it may be saved."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._record(*pending)
        self._write()

    def _record(self, step, share, metrics):
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLossError(self._explain(step, share, loss, norm))
        now = self._clock.elapsed()
        if self._first is None:
            self._first = (step, now)
        self._step, self._share, self._now = step, share, now
        self._losses.append(loss)
        self._norms.append(norm)
        if self._report is not None:
            smooth = sum(self._losses) / len(self._losses)
            remaining = self._clock.remaining(share)
            bits = smooth / math.log(2)
            self._report(
                Progress(step, share, smooth, bits, self._rate(), now, remaining)
            )
        if len(self._losses) == _LOG_EVERY:
            self._write()

    def _rate(self):
        step, begin = self._first or (self._step, self._now)
        steps = self._step - step
        if steps == 0:
            return 0.0
        return steps * self._trainer.tokens_per_step / (self._now - begin)

    def _write(self):
        if not self._losses:
            return
        loss = sum(self._losses) / len(self._losses)
        self._run.append_metrics(
            {
                "step": self._step,
                "loss": loss,
                "bits_per_byte": loss / math.log(2),
                "grad_norm": max(self._norms),
                "learning_rate": self._trainer.learning_rate(self._share),
                "tokens_per_second": self._rate(),
                "elapsed": self._now,
            }
        )
        self._losses, self._norms = [], []

    def _explain(self, step, share, loss, norm):
        kept = self._checkpoints.latest_step()
        saved = (
            "there is no checkpoint before it"
            if kept is None
            else f"the checkpoint of step {kept} is good and kept"
        )
        rate = self._trainer.learning_rate(share)
        return (
            f"Step {step} gave a loss of {loss} and a gradient of norm {norm}, at a "
            f"learning rate of {rate:.2g}; {saved}. Lower `learning_rate` or "
            "`clip_norm`, or lengthen the warm-up, and start again."
        )
