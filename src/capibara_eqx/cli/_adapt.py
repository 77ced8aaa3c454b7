import argparse
import time
from collections.abc import Sequence

from ..train import (
    SINE_METHODS,
    SINE_STEPS,
    SineComparison,
    SineConfig,
    SineFolder,
    SineResult,
    plot_adaptation,
)
from ._console import Console
from ._interrupt import interrupts


# Numbers of steps in the table, and what stands above them.
_SHOWN = {0: "before", 1: "1 step", 5: "5 steps", SINE_STEPS: f"{SINE_STEPS} steps"}


def run_adapt(arguments: argparse.Namespace) -> int:
    """`capibara adapt`."""
    console = Console()
    config = SineConfig(
        iterations=arguments.iterations, shots=arguments.shots, seed=arguments.seed
    )
    out = arguments.out or time.strftime("runs/%Y%m%d-%H%M%S-adapt")
    return compare(console, SineFolder.create(out), config)


def compare(console: Console, folder: SineFolder, config: SineConfig) -> int:
    """Train and compare the methods; the exit code, 130 if it was interrupted."""
    console.say(
        "Sine regression: "
        f"{config.shots} examples of a new sine, and a few steps of gradient descent."
    )
    comparison = SineComparison(config)
    results: list[SineResult] = []
    with interrupts() as should_stop, console.progress("Learning to adapt") as bar:
        for index, method in enumerate(config.methods):
            title = SINE_METHODS[method]
            bar(index / len(config.methods), title)

            def report(done, loss, index=index, title=title):
                share = (index + done / config.iterations) / len(config.methods)
                bar(share, f"{title}: iteration {done}, loss {loss:.3f}")

            result = comparison.run(method, report=report, should_stop=should_stop)
            results.append(result)
            folder.write(config, results)
            if should_stop():
                break
        else:
            bar(1.0, "")
    plot_adaptation(folder.plot_path, comparison.test, results)
    show_adaptation(console, config, results)
    console.say(f"The numbers are in {folder.record_path}; look at {folder.plot_path}.")
    last = results[-1]
    if len(results) < len(config.methods) or 0 < last.iterations < config.iterations:
        console.say(
            f"Stopped early: {SINE_METHODS[last.method]} came last, after "
            f"{last.iterations} of {config.iterations} iterations."
        )
        return 130
    return 0


def show_adaptation(
    console: Console, config: SineConfig, results: Sequence[SineResult]
) -> None:
    """The errors of every method before and after steps on new tasks."""
    rows = [
        (SINE_METHODS[result.method], *(_cell(result, step) for step in _SHOWN))
        for result in results
    ]
    tasks = len(results[0].errors)
    console.table(
        f"Mean squared error on {tasks} new sines from {config.shots} examples each",
        ("method", *_SHOWN.values()),
        rows,
    )
    console.say(
        "With intervals of 95 %. For every method and number of steps the rate is the "
        "best of the same few on other sines; that of Meta-SGD stretches its own."
    )


def _cell(result: SineResult, step: int) -> str:
    error = f"{result.mean(step):.2f} ± {result.margin(step):.2f}"
    return error if step == 0 else f"{error}\nrate {result.rates[step - 1]:g}"
