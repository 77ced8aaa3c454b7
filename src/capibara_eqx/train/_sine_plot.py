from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..internal import require_extra
from ..meta import Task
from ._files import writing
from ._sine_comparison import SINE_METHODS, SINE_STEPS, SineResult
from ._sine_folder import AGAIN


# What is drawn in full, if it is there: the baselines and the method.
_DRAWN = ("random", "joint", "maml")


def plot_adaptation(path: Path, tasks: Task, results: Sequence[SineResult]) -> None:
    """Draw curves before and after adaptation, and the error at every step.

    **Arguments:**

    - `path`: of the PNG.
    - `tasks`: the test tasks that the results are of.
    - `results`: of one method or more.

    **Raises:**

    `ImportError` with the install command if matplotlib is not installed; `OSError`
    that names `path` if it cannot be written.
    """
    require_extra("matplotlib", "train")
    from matplotlib.figure import Figure

    drawn = [result for result in results if result.method in _DRAWN] or results[:1]
    columns = len(drawn)
    figure = Figure(figsize=(3 * columns + 4.5, 6), layout="constrained")
    grid = figure.add_gridspec(2, columns + 1, width_ratios=[1] * columns + [1.4])
    for row, task in enumerate(_two_tasks(tasks)):
        for column, result in enumerate(drawn):
            axes = figure.add_subplot(grid[row, column])
            _draw_task(axes, tasks, task, result)
            if row == 0:
                axes.set_title(SINE_METHODS[result.method])
            axes.label_outer()
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower left", ncols=columns + 1)
    axes = figure.add_subplot(grid[:, columns])
    _draw_errors(axes, results)
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower right", ncols=3)
    with writing(path, AGAIN):
        figure.savefig(path, dpi=120)


def _two_tasks(tasks: Task) -> tuple[int, int]:
    """One of usual and one of large amplitude, whatever the methods make of them."""
    largest = np.abs(np.asarray(tasks.query[1])).max(axis=(1, 2))
    order = np.argsort(largest)
    return int(order[len(order) // 2]), int(order[len(order) * 9 // 10])


def _draw_task(axes, tasks: Task, task: int, result: SineResult) -> None:
    """The sine, the few points of it that are seen, and what the model makes of it."""
    x, y = (np.asarray(part)[task, :, 0] for part in tasks.query)
    seen = [np.asarray(part)[task, :, 0] for part in tasks.support]
    before, one, *_, last = result.predictions[task]
    axes.plot(x, y, color="0.75", linewidth=4, label="a new sine")
    axes.plot(*seen, "k^", markersize=5, label="examples of it")
    axes.plot(x, before, color="C0", linestyle=":", label="before")
    axes.plot(x, one, color="C1", label="after 1 step")
    axes.plot(x, last, color="C3", label=f"after {SINE_STEPS} steps")
    axes.set_ylim(-6.5, 6.5)


def _draw_errors(axes, results: Sequence[SineResult]) -> None:
    steps = list(range(SINE_STEPS + 1))
    names = list(SINE_METHODS)
    for result in results:
        means = np.array([result.mean(step) for step in steps])
        margins = np.array([result.margin(step) for step in steps])
        color = f"C{names.index(result.method)}"
        label = SINE_METHODS[result.method]
        axes.plot(steps, means, color=color, marker=".", label=label)
        axes.fill_between(
            steps, means - margins, means + margins, color=color, alpha=0.2, linewidth=0
        )
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("steps of gradient descent on a new task")
    axes.set_title(f"mean squared error, {len(results[0].errors)} tasks, 95 % bands")
