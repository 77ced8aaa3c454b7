import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..internal import require_extra
from ..models import Cost
from ..train import Progress


class Console:
    """What the commands print, by rich."""

    def __init__(self):
        self._rich = require_extra("rich.console", "train").Console(highlight=False)

    def say(self, text: str) -> None:
        """One line of plain text."""
        self._rich.print(text, markup=False, soft_wrap=True)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        justify: str = "right",
    ) -> None:
        """A table, its first column on the left, the others where `justify` says."""
        table = require_extra("rich.table", "train").Table(title=title)
        for index, column in enumerate(columns):
            side = "left" if index == 0 else justify
            table.add_column(column, justify=side, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._rich.print(table)

    @contextmanager
    def progress(self, title: str) -> Iterator[Any]:
        """A live bar; gives a function of `(share, text)`.

        Where output is no terminal, a line comes out for every tenth of the work.
        """
        if self._rich.is_terminal:
            module = require_extra("rich.progress", "train")
            columns = (
                module.TextColumn("{task.description}"),
                module.BarColumn(bar_width=24),
                module.TextColumn("{task.percentage:>3.0f}%"),
                module.TextColumn("{task.fields[text]}"),
            )
            with module.Progress(*columns, console=self._rich) as bar:
                task = bar.add_task(title, total=1.0, text="")
                yield lambda share, text="": bar.update(
                    task, completed=share, text=text
                )
            return
        shown = 0

        def line(share: float, text: str = "") -> None:
            nonlocal shown
            if share * 10 >= shown:
                shown = math.floor(share * 10) + 1
                self.say(f"{title} {share:4.0%}  {text}")

        yield line


def describe(progress: Progress) -> str:
    """The numbers of a running training, for its bar."""
    left = "--:--"
    if math.isfinite(progress.remaining):
        left = "{}:{:02d}".format(*divmod(round(progress.remaining), 60))
    return (
        f"step {progress.step}  loss {progress.loss:.3f}  "
        f"{progress.bits_per_byte:.3f} bits/byte  "
        f"{progress.tokens_per_second / 1000:.1f}k tokens/s  "
        f"{left} left"
    )


def show_references(
    console: Console, heldout: float, references: Mapping[str, float]
) -> None:
    """The held-out result among the references, best first."""
    values = {**references, "this model": heldout}
    rows = [
        (name.replace("_", " "), f"{value:.3f}", "<--" if name == "this model" else "")
        for name, value in sorted(values.items(), key=lambda item: item[1])
    ]
    console.table("The same held-out bytes", ("by", "bits per byte", ""), rows)


def show_cost(console: Console, costs: Sequence[Cost]) -> None:
    """Parameters, state and work of a model, part by part."""
    rows = [
        (
            cost.name,
            f"{cost.parameters:,}",
            f"{cost.parameter_bytes:,}",
            f"{cost.state_bytes:,}",
            f"{cost.flops:,}",
        )
        for cost in costs
    ]
    columns = ("part", "parameters", "bytes", "state bytes / sequence", "FLOPs / token")
    console.table("Model", columns, rows)


def fail(message: str, code: int = 1) -> int:
    """Print an error to standard error; gives the exit code."""
    print(f"capibara: error: {message}", file=sys.stderr)
    return code
