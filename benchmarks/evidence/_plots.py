"""Curves, one colour a model and one line a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capibara_eqx.internal import require_extra


# The same drawing gives the same file, whenever and wherever it is made.
_FIXED = {"svg.hashsalt": "capibara", "svg.fonttype": "none"}


@dataclass(frozen=True)
class Line:
    """Points of one model and seed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "-"


def plot(
    path: Path, lines: Sequence[Line], x_label: str, y_label: str, *, log: bool = False
) -> None:
    """Draw lines; those of one name have one colour and one entry in the legend.

    **Arguments:**

    - `path`: of the SVG; its folder is made.
    - `lines`: what to draw.
    - `x_label`, `y_label`: of the axes.
    - `log`: whether the horizontal axis is logarithmic, in powers of two.

    **Raises:**

    `ImportError` with the install command if matplotlib is not installed.
    """
    matplotlib = require_extra("matplotlib", "train")
    from matplotlib.figure import Figure

    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(_names(lines)))}
    labelled = set()
    with matplotlib.rc_context(_FIXED):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            label = None if line.name in labelled else line.name
            labelled.add(line.name)
            axes.plot(
                line.x,
                line.y,
                line.style,
                color=colours[line.name],
                label=label,
                linewidth=1.2,
                markersize=4,
            )
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color="0.9")
        axes.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _names(lines: Sequence[Line]) -> list[str]:
    return [line.name for line in lines]
