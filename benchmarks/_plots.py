"""Time and temporary memory against the length of the sequence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capibara_eqx.internal import require_extra

from ._slope import slope


Record = dict[str, Any]

_QUANTITIES = {"median_ms": "time, ms", "temp_bytes": "temporaries, MiB"}
_UNITS = {"median_ms": 1.0, "temp_bytes": 2.0**20}
# The same drawing gives the same file, whenever and wherever it is made.
_FIXED = {"svg.hashsalt": "capibara", "svg.fonttype": "none"}


def plot_lengths(path: Path, measurements: Sequence[Record]) -> None:
    """Draw a panel for each quantity and mode, with the slopes in its legend.

    **Arguments:**

    - `path`: of the SVG; its folder is made.
    - `measurements`: records of one operation at several lengths.

    **Raises:**

    `ImportError` with the install command if matplotlib is not installed.
    """
    matplotlib = require_extra("matplotlib", "train")
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(m["mode"] for m in measurements))
    with matplotlib.rc_context(_FIXED):
        figure = Figure(figsize=(5 * len(modes), 8), layout="constrained")
        panels = figure.subplots(len(_QUANTITIES), len(modes), squeeze=False)
        for row, quantity in zip(panels, _QUANTITIES, strict=True):
            for axes, mode in zip(row, modes, strict=True):
                own = [m for m in measurements if m["mode"] == mode]
                axes.set_title(mode.replace("_", " and "))
                _draw(axes, own, quantity)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _draw(axes: Any, measurements: Sequence[Record], quantity: str) -> None:
    for name in dict.fromkeys(m["implementation"] for m in measurements):
        points = [
            (m["spec"]["seq"], m[quantity] / _UNITS[quantity])
            for m in measurements
            # A logarithmic axis has no place for what allocates nothing.
            if m["implementation"] == name and m[quantity]
        ]
        if points:
            axes.loglog(
                *zip(*points, strict=True), marker=".", label=_label(name, points)
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel(_QUANTITIES[quantity])
    axes.grid(color="0.9")
    axes.legend(fontsize="small")


def _label(name: str, points: Sequence[tuple[float, float]]) -> str:
    found = slope(points)
    return name if found is None else f"{name}: slope {found:.2f}"
