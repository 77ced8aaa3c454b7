"""The outer loop of meta-learning, many of its steps in one compiled call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray, PyTree

from capibara_eqx.meta import Task, init_meta_state, make_meta_step


@dataclass(frozen=True)
class MetaSchedule:
    """Adam at one rate, on `tasks` new tasks a step.

    `evaluations` is how often the learner is judged, evenly over the steps.
    """

    steps: int
    tasks: int
    learning_rate: float
    evaluations: int = 10


class OuterLoop:
    """A learner while it is trained.

    **Arguments:**

    - `learner`: what `task_loss` takes; all its leaves are arrays.
    - `sample`: tasks of `data` and a key; it runs within the compiled steps.
    - `task_loss`: a method, such as `meta.maml(...)`.
    - `optimizer`: of the outer loop.
    - `key`: for the tasks.
    - `data`: what they are drawn from, if anything: arrays that are passed to the
        compiled steps, which would take minutes to compile around constants.
    """

    def __init__(
        self,
        learner: PyTree,
        sample: Callable[[PyTree, PRNGKeyArray], Task],
        task_loss: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        *,
        key: PRNGKeyArray,
        data: PyTree = None,
    ):
        step = make_meta_step(optimizer, task_loss)

        @jax.jit
        def advance(state, keys, data):
            def one(state, key):
                return step(state, sample(data, key))

            state, losses = jax.lax.scan(one, state, keys)
            return state, losses.mean()

        self._advance = advance
        self._state = init_meta_state(learner, optimizer)
        self._key, self._data = key, data
        self.steps = 0

    @property
    def learner(self) -> PyTree:
        return self._state.model

    def advance(self, steps: int) -> float:
        """Make so many steps in one call; their mean loss."""
        keys = jax.random.split(jax.random.fold_in(self._key, self.steps), steps)
        self._state, loss = self._advance(self._state, keys, self._data)
        self.steps += steps
        return float(loss)

    def point(
        self, loss: float, evaluate: Callable[[PyTree], dict[str, float]]
    ) -> dict[str, float]:
        """What a curve says of the learner as it is; printed as well."""
        point = {"step": self.steps, "loss": loss, **evaluate(self.learner)}
        line = "  ".join(f"{name} {value:.4g}" for name, value in point.items())
        print(f"    {line}", flush=True)
        return point

    def run(
        self, schedule: MetaSchedule, evaluate: Callable[[PyTree], dict[str, float]]
    ) -> list[dict[str, float]]:
        """All steps of a schedule; the points of the curve."""
        length, rest = divmod(schedule.steps, schedule.evaluations)
        if rest:
            raise ValueError(
                f"`steps` must be a multiple of `evaluations`, got {schedule.steps} "
                f"and {schedule.evaluations}."
            )
        return [
            self.point(self.advance(length), evaluate)
            for _ in range(schedule.evaluations)
        ]


def margin(values) -> float:
    """Half the width of the 95 % interval of the mean of a NumPy array of values."""
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5)
