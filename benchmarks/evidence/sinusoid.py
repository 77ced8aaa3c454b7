"""A sine from five or ten of its points, in a step or a few of gradient descent.

The task of Finn et al. (arXiv 1703.03400, section 5.1): amplitude in [0.1, 5], phase in
[0, pi], points in [-5, 5]; a network 1-40-40-1 of ReLUs, 25 tasks in a step of Adam at
rate 0.001, one inner step of rate 0.01 in training. MAML and its first-order form;
Meta-SGD (Li et al., arXiv 1707.09835) with a learned rate for each parameter; CAVIA
(Zintgraf et al., arXiv 1810.03642), which adapts five inputs alone, at rate 1, and
clips its outer gradients to 10 to either side. Weights begin as He et al. draw them
(arXiv 1502.01852). Errors are mean squared ones over 100 points from -5 to 5, with 95 %
intervals over the test tasks; every inner step is of the whole support.

Published figures stand beside one step and are of other programs, whose tests differ in
the number of tasks and the points judged. [1]: Li et al., as the README of
PaddlePaddle/PARL quotes them; [2]: that README's own MAML; [3]: README of
63days/Meta-SGD, on 100 tasks. Those of CAVIA's paper, and of Li et al. for ten shots,
could not be looked up and are left out.

All but CAVIA are trained for one step, and only what is measured tells whether more
help. Meta-SGD in particular learns rates that are right once: where steps make a task's
error overflow, the table says of how many tasks, and gives the median instead of a mean
that a few tasks decide.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from capibara_eqx.meta import (
    Task,
    WithContext,
    WithRates,
    adapt_trajectory,
    cavia,
    maml,
    meta_sgd,
    only,
    sgd,
)
from capibara_eqx.meta.tasks import sample_sinusoids

from .._records import Bar
from .._tables import Record, markdown_table
from ._meta_training import MetaSchedule, OuterLoop, margin
from ._models import ReLUNetwork
from ._pages import of_model
from ._plots import Line, Panel, plot_panels
from ._records import Outcome
from ._training import size


NAME = "sinusoid"
TITLE = "Sines from a few points"
SHOTS = (5, 10)
_RATE = 0.01
_CONTEXT, _CONTEXT_RATE = 5, 1.0
_CLIP = 10.0
# Inner steps of the table, of which the last is the most that are made.
_SHOWN = (1, 2, 5, 10)
# A mean above this is that of a few tasks: the error before adapting is about four.
_WILD = 100.0
# Ten such steps are finite in float32; what a network makes of them is not.
_LARGEST_STEP = 1e20

_PUBLISHED = {
    "MAML, 5 shots": "1.13 ± 0.18 [1], 0.93 ± 0.02 [2]",
    "Meta-SGD, 5 shots": "0.90 ± 0.16 [1]",
    "MAML, 10 shots": "0.67 [3]",
    "Meta-SGD, 10 shots": "0.31 [3]",
}


@dataclass(frozen=True)
class Settings:
    schedule: MetaSchedule
    hidden: int = 40
    shots: tuple[int, ...] = SHOTS
    test_tasks: int = 600
    points: int = 100
    seeds: tuple[int, ...] = (0,)


QUICK = Settings(MetaSchedule(2, 2, 1e-3, evaluations=2), 3, SHOTS, 4, 5)


class Method(NamedTuple):
    """How to learn and, with what was learned, how to adapt.

    `inner` makes of a learner the model that adapts, the inner optimiser and the leaves
    that it changes.
    """

    steps: int
    start: Callable[[int, PRNGKeyArray], PyTree]
    task_loss: Callable[..., Any]
    inner: Callable[[PyTree], tuple[PyTree, optax.GradientTransformation, Any]]
    clips: bool = False


def squared_error(
    model: PyTree, batch: tuple[Array, Array], *, key: PRNGKeyArray | None = None
) -> Float[Array, ""]:
    """The mean squared error on `(x, y)`."""
    del key
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def _plain(hidden: int, key: PRNGKeyArray) -> ReLUNetwork:
    return ReLUNetwork((1, hidden, hidden, 1), key=key)


def _with_rates(hidden: int, key: PRNGKeyArray) -> WithRates:
    return WithRates.init(_plain(hidden, key), _RATE)


def _with_context(hidden: int, key: PRNGKeyArray) -> WithContext:
    network = ReLUNetwork((1 + _CONTEXT, hidden, hidden, 1), key=key)
    return WithContext.init(network, _CONTEXT)


_ALL = eqx.is_inexact_array
_one_step = partial(maml, squared_error, optimizer=sgd(_RATE), steps=1)
METHODS = {
    "MAML": Method(
        70_000, _plain, _one_step(), lambda model: (model, sgd(_RATE), _ALL)
    ),
    "FOMAML": Method(
        *(70_000, _plain, _one_step(first_order=True)),
        lambda model: (model, sgd(_RATE), _ALL),
    ),
    "Meta-SGD": Method(
        *(60_000, _with_rates, meta_sgd(squared_error, steps=1)),
        lambda learner: (learner.model, sgd(learner.rates), _ALL),
    ),
    "CAVIA": Method(
        *(50_000, _with_context),
        cavia(squared_error, optimizer=sgd(_CONTEXT_RATE), steps=1),
        lambda learner: (
            *(learner, sgd(_CONTEXT_RATE)),
            only(learner, lambda learner: learner.context),
        ),
        clips=True,
    ),
}


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each method, number of shots and seed."""
    for name, method in METHODS.items():
        settings = QUICK if quick else Settings(MetaSchedule(method.steps, 25, 1e-3))
        for shots in settings.shots:
            for seed in settings.seeds:
                yield _outcome(name, shots, seed, settings)


def _outcome(name: str, shots: int, seed: int, settings: Settings) -> Outcome:
    method, schedule = METHODS[name], settings.schedule
    start_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    learner = method.start(settings.hidden, start_key)
    optimizer = optax.adam(schedule.learning_rate)
    if method.clips:
        optimizer = optax.chain(optax.clip(_CLIP), optimizer)
    # As many to be judged by as to learn from, which is what the authors do.
    sample = lambda _, key: sample_sinusoids(
        key, schedule.tasks, shots=shots, queries=shots
    )
    tests = sample_sinusoids(
        *(test_key, settings.test_tasks),
        **{"shots": shots, "queries": settings.points, "grid": True},
    )
    adapted = eqx.filter_jit(lambda learner: predictions(method, learner, tests))

    def evaluate(learner):
        return {"error": float(errors(adapted(learner), tests)[:, 1].mean())}

    loop = OuterLoop(learner, sample, method.task_loss, optimizer, key=train_key)
    curve = loop.run(schedule, evaluate)
    found = adapted(loop.learner)
    results = summary(errors(found, tests))
    example = _example(tests, found)
    asked = dataclasses.asdict(settings)
    model = f"{name}, {shots} shots"
    return Outcome(model, seed, asked, size(loop.learner), results, curve, example)


def predictions(
    method: Method, learner: PyTree, tasks: Task
) -> Float[Array, "tasks steps points"]:
    """What is said of the queries after 0, 1, ... inner steps."""
    model, optimizer, where = method.inner(learner)

    def loss(model, batch):
        found = squared_error(model, batch)
        # The inner loop stops at what is not finite. Here it shall show in the error.
        return jnp.where(jnp.isfinite(found), found, 0.0)

    optimizer = optax.chain(optimizer, optax.zero_nans(), optax.clip(_LARGEST_STEP))

    def one(task):
        path = adapt_trajectory(
            *(loss, model, task.support),
            **{"optimizer": optimizer, "steps": _SHOWN[-1], "where": where},
        )
        moved, fixed = eqx.partition(path, where)
        x, _ = task.query
        after = jax.vmap(lambda moved: eqx.combine(moved, fixed)(x)[:, 0])(moved)
        return jnp.concatenate([model(x)[None, :, 0], after])

    return jax.vmap(one)(tasks)


def errors(found: Float[Array, "tasks steps points"], tasks: Task) -> np.ndarray:
    """The mean squared error of each task after each number of steps."""
    _, y = tasks.query
    wide = np.asarray(y, np.float64)[:, None, :, 0]
    return ((np.asarray(found, np.float64) - wide) ** 2).mean(axis=-1)


def summary(found: np.ndarray) -> dict[str, Any]:
    """Means, margins and medians over tasks, and how many are not finite, by step.

    A mean and a margin are `None` if any is not.
    """
    broken = (~np.isfinite(found)).sum(axis=0)
    whole = [
        column if not count else None
        for column, count in zip(found.T, broken, strict=True)
    ]
    medians = np.median(np.where(np.isfinite(found), found, np.inf), axis=0)
    return {
        "mean": [None if c is None else _rounded(c.mean()) for c in whole],
        "margin": [None if c is None else _rounded(margin(c)) for c in whole],
        "median": [_rounded(m) if np.isfinite(m) else None for m in medians],
        "overflown": broken.tolist(),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _example(tasks: Task, found: Array) -> dict[str, Any]:
    """The first task, and what was said of it."""
    (x, y), (grid, true) = tasks.support, tasks.query
    said = {str(step): found[0, step] for step in (0, 1, _SHOWN[-1])}
    parts = {
        **{"x": x[0, :, 0], "y": y[0, :, 0]},
        **{"grid": grid[0, :, 0], "true": true[0, :, 0]},
    }
    return {
        name: [round(float(v), 3) if np.isfinite(v) else None for v in values]
        for name, values in {**parts, **said}.items()
    }


def _cell(results: dict[str, Any], step: int) -> str:
    mean, median = results["mean"][step], results["median"][step]
    if mean is not None and mean < _WILD:
        return f"{mean:.3f} ± {results['margin'][step]:.3f}"
    what = "overflows" if median is None else f"median {median:.3g}"
    count = results["overflown"][step]
    return f"{what}, {count} overflown" if count else f"{what}, mean {mean:.1g}"


def tables(records: Sequence[Record]) -> list[str]:
    """Errors by method, shots and inner steps, beside published ones of one step."""
    rows = []
    for r in records:
        cells = [_cell(r["results"], step) for step in _SHOWN]
        steps = f"{r['settings']['schedule']['steps']:,}"
        published = _PUBLISHED.get(r["model"], "")
        rows.append([r["model"], *cells, published, steps, f"{r['wall_s']:.0f}"])
    inner = [f"{step} step{'s' * (step > 1)}" for step in _SHOWN]
    titles = ["method", *inner, "published, 1 step", "outer steps", "seconds"]
    return markdown_table(titles, "lrrrrlrr", rows)


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """MAML and CAVIA after one step, from ten shots."""
    for method, limit in (("MAML", 0.40), ("CAVIA", 0.22)):
        own = of_model(records, f"{method}, 10 shots")
        value = float(np.mean([r["results"]["mean"][1] for r in own]))
        statement = f"{method} from 10 shots, mean squared error after one step"
        yield Bar(f"{NAME}_{method}", statement, round(value, 4), limit, False, "")


def draw(records: Sequence[Record], path: Path) -> None:
    """Errors by inner step, and a task before and after."""
    lines = []
    for r in records:
        method, shots = r["model"].split(", ")
        medians = r["results"]["median"]
        there = [(k, m) for k, m in enumerate(medians) if m is not None and m < _WILD]
        style = "--" if shots == "5 shots" else "-"
        lines.append(Line(method, *zip(*there, strict=True), style=style))
    panels = [
        Panel(
            *(lines, "inner steps", "median of the squared error"),
            **{"title": "5 shots (dashed), 10 shots", "log_y": True},
        )
    ]
    for name in ("MAML, 10 shots", "CAVIA, 10 shots"):
        for r in of_model(records, name)[:1]:
            panels.append(_example_panel(name, r["example"]))
    plot_panels(path, panels)


def _example_panel(name: str, example: dict[str, Any]) -> Panel:
    drawn = {"before": "0", "1 step": "1", f"{_SHOWN[-1]} steps": str(_SHOWN[-1])}
    lines = [Line("the sine", example["grid"], example["true"])]
    lines += [Line(label, example["grid"], example[k]) for label, k in drawn.items()]
    lines.append(Line("seen", example["x"], example["y"], "o"))
    return Panel(lines, "x", "y", title=name)
