"""Curves, one colour a model and one line a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Panel:
    """Lines in one pair of axes.

    `log` and `log_y` say whether the horizontal axis is logarithmic, in powers of two,
    and the vertical one, in powers of ten.
    """

    lines: Sequence[Line]
    x_label: str
    y_label: str
    title: str = ""
    log: bool = False
    log_y: bool = False


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
    _save(path, [Panel(lines, x_label, y_label, log=log)], (7, 4))


def plot_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side, as `plot` draws one."""
    _save(path, panels, (4.5 * len(panels), 4))


def _save(path: Path, panels: Sequence[Panel], figsize: tuple[float, float]) -> None:
    matplotlib = require_extra("matplotlib", "train")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_FIXED):
        figure = Figure(figsize=figsize, layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _draw(axes: Any, panel: Panel) -> None:
    names = dict.fromkeys(line.name for line in panel.lines)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    labelled = set()
    for line in panel.lines:
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
    if panel.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        # Side by side, more numbers of five digits would run into each other.
        axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="0.9")
    axes.legend(fontsize="small")
