import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..internal import check_choice, check_range, check_seed, check_size
from ..meta import Task, adapt_trajectory, init_meta_state, make_meta_step
from ..meta.tasks import sample_sinusoids
from ._sine_learners import (
    INNER_RATE,
    SineModel,
    clipped_sgd,
    make_learner,
    model_and_rates,
    squared_error,
)


# Names as they are shown, in the order in which they are trained.
SINE_METHODS = {
    "random": "random start",
    "joint": "joint",
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "reptile": "Reptile",
    "meta_sgd": "Meta-SGD",
}
SINE_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SINE_STEPS = 10

_TASKS_PER_STEP = 25
_QUERIES = 10
_LEARNING_RATE = 3e-3
# Between two questions whether to stop.
_CHUNK = 100
_TEST_TASKS = 600
_POINTS = 50


@dataclass(frozen=True)
class SineConfig:
    """What is compared, and for how long each method is trained.

    **Raises:**

    `ValueError` for sizes that are not positive, more than 1000 shots, a seed that is
    none, an unknown method or none.
    """

    iterations: int = 1500
    shots: int = 10
    seed: int = 0
    methods: tuple[str, ...] = tuple(SINE_METHODS)

    def __post_init__(self):
        check_size("iterations", self.iterations)
        check_size("shots", self.shots)
        check_range("shots", self.shots, least=1, most=1000)
        check_seed("seed", self.seed)
        if not self.methods:
            raise ValueError("`methods` must name at least one method, got none.")
        for method in self.methods:
            check_choice("methods", method, SINE_METHODS)


class SineResult(NamedTuple):
    """How well a method adapts to test tasks.

    - `method`: its name, a key of `SINE_METHODS`.
    - `iterations`: how long it was trained.
    - `seconds`: how long that took, compiling included.
    - `rates`: for 1, 2, ... steps at test time, each of `SINE_RATES`.
    - `errors`: `(tasks, steps + 1)`, mean squared error after 0, 1, ... steps.
    - `predictions`: `(tasks, steps + 1, points)`, what the model makes of each point.
    """

    method: str
    iterations: int
    seconds: float
    rates: tuple[float, ...]
    errors: np.ndarray
    predictions: np.ndarray

    def mean(self, step: int) -> float:
        """The mean error over test tasks after `step` steps."""
        return float(self.errors[:, step].mean())

    def margin(self, step: int) -> float:
        """Half the width of the 95 % interval of `mean`."""
        errors = self.errors[:, step]
        return float(1.96 * errors.std(ddof=1) / np.sqrt(len(errors)))


class SineComparison:
    """Methods of meta-learning side by side on sine regression.

    All start from the same weights, are trained on the same tasks for as many
    iterations, and adapt to the same test tasks, each number of steps at the rate, out
    of `SINE_RATES`, that has the least error after as many on validation tasks. That of
    Meta-SGD stretches its learned rates in proportion.
    """

    def __init__(self, config: SineConfig):
        self.config = config
        init_key, self._train_key, test_key = _keys(config.seed)
        self._model = _start(init_key)
        few = _TEST_TASKS // len(SINE_RATES)
        tasks = _sample_tests(test_key, few + _TEST_TASKS, config.shots)
        self.test = jax.tree.map(lambda leaf: leaf[few:], tasks)
        # Every rate on every one of a few tasks: as many pairs as there are test tasks,
        # so that both are served by one compiled function.
        self._validation = jax.tree.map(
            lambda leaf: jnp.repeat(leaf[:few], len(SINE_RATES), axis=0), tasks
        )

    def run(
        self,
        method: str,
        *,
        report: Callable[[int, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> SineResult:
        """Train a method and let it adapt to the test tasks.

        **Arguments:**

        - `method`: of `SINE_METHODS`.
        - `report`: called with the number of iterations and their mean loss lately.
        - `should_stop`: asked now and then; what has been trained by then is scored.
        """
        check_choice("method", method, SINE_METHODS)
        start = time.perf_counter()
        learner, iterations = self._train(method, report, should_stop)
        jax.block_until_ready(learner)
        seconds = time.perf_counter() - start
        rates = self._choose_rates(method, learner)
        predictions = np.empty((_TEST_TASKS, SINE_STEPS + 1, _POINTS))
        errors = np.empty((_TEST_TASKS, SINE_STEPS + 1))
        for rate in set(rates):
            same = np.full(_TEST_TASKS, rate)
            found = self._adapt(method, learner, same, self.test)
            # Before the first step a rate does not matter.
            steps = [0, *(i + 1 for i, chosen in enumerate(rates) if chosen == rate)]
            predictions[:, steps], errors[:, steps] = (part[:, steps] for part in found)
        return SineResult(method, iterations, seconds, rates, errors, predictions)

    def _train(self, method, report, should_stop):
        if method == "random":
            return self._model, 0
        learner, task_loss = make_learner(method, self._model)
        total = self.config.iterations
        rate = optax.cosine_decay_schedule(_LEARNING_RATE, total)
        optimizer = optax.adam(rate)
        step = make_meta_step(optimizer, task_loss)
        state = init_meta_state(learner, optimizer)

        @jax.jit
        def advance(state, tasks, count):
            def body(index, carry):
                state, losses = carry
                now = jax.tree.map(lambda leaf: leaf[index], tasks)
                state, loss = step(state, now)
                return state, losses + loss

            return jax.lax.fori_loop(0, count, body, (state, jnp.zeros(())))

        done = 0
        while done < total:
            count = min(_CHUNK, total - done)
            key = jax.random.fold_in(self._train_key, done)
            tasks = _sample_training(key, self.config.shots)
            state, losses = advance(state, tasks, count)
            done += count
            if report is not None:
                report(done, float(losses) / count)
            if should_stop is not None and should_stop():
                break
        return state.model, done

    def _choose_rates(self, method, learner) -> tuple[float, ...]:
        """The rate of least validation error, for every number of steps."""
        num_tasks = _TEST_TASKS // len(SINE_RATES)
        rates = np.tile(SINE_RATES, num_tasks)
        _, errors = self._adapt(method, learner, rates, self._validation)
        means = errors.reshape(num_tasks, len(SINE_RATES), -1).mean(axis=0)
        return tuple(SINE_RATES[best] for best in means[:, 1:].argmin(axis=0))

    def _adapt(self, method, learner, rates, tasks) -> tuple[np.ndarray, np.ndarray]:
        """Predictions and errors of every task, at a rate for each."""
        model, own = model_and_rates(method, learner)
        scales = jnp.asarray(rates / INNER_RATE, jnp.float32)
        predictions = np.asarray(_predict(model, own, scales, tasks), np.float64)
        _, y = tasks.query
        errors = (predictions - np.asarray(y, np.float64)[:, None, :, 0]) ** 2
        return predictions, errors.mean(axis=-1)


# In one compiled call each: operation by operation they would take a second to compile.
@jax.jit
def _keys(seed):
    return jax.random.split(jax.random.key(seed), 3)


@jax.jit
def _start(key):
    return SineModel(key=key)


@partial(jax.jit, static_argnums=(1, 2))
def _sample_tests(key, num_tasks, shots):
    return sample_sinusoids(key, num_tasks, shots=shots, queries=_POINTS, grid=True)


@partial(jax.jit, static_argnums=1)
def _sample_training(key, shots):
    """The tasks of a chunk of iterations, on two leading axes.

    Outside of the training step, of which every method has its own, since random
    numbers take as long to compile as all the rest of it.
    """
    num_tasks = _CHUNK * _TASKS_PER_STEP
    tasks = sample_sinusoids(key, num_tasks, shots=shots, queries=_QUERIES)
    return jax.tree.map(
        lambda leaf: leaf.reshape(_CHUNK, _TASKS_PER_STEP, *leaf.shape[1:]), tasks
    )


@eqx.filter_jit
def _predict(model, rates, scales, tasks):
    """What the model says of the queries, before and after every step."""

    def one(scale, task: Task):
        optimizer = clipped_sgd(jax.tree.map(lambda rate: scale * rate, rates))
        path = adapt_trajectory(
            squared_error, model, task.support, optimizer=optimizer, steps=SINE_STEPS
        )
        x, _ = task.query
        after = jax.vmap(lambda adapted: adapted(x)[:, 0])(path)
        return jnp.concatenate([model(x)[None, :, 0], after])

    return jax.vmap(one)(scales, tasks)
