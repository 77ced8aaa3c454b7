from collections.abc import Mapping, Sequence
from pathlib import Path

from ..internal import require_extra
from ._files import writing


def plot_loss(
    path: Path,
    metrics: Sequence[Mapping[str, int | float]],
    heldout_bits_per_byte: float,
    references: Mapping[str, float],
) -> None:
    """Draw the loss over the time, with the held-out result and the references.

    **Arguments:**

    - `path`: of the PNG.
    - `metrics`: lines of metrics.jsonl, with `bits_per_byte` and `elapsed`.
    - `heldout_bits_per_byte`: the result after training.
    - `references`: bits a byte by name.

    **Raises:**

    `ImportError` with the install command if matplotlib is not installed; `OSError`
    that names `path` if it cannot be written.
    """
    require_extra("matplotlib", "train")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    elapsed = [line["elapsed"] for line in metrics]
    bits = [line["bits_per_byte"] for line in metrics]
    axes.plot(elapsed, bits, color="0.75", linewidth=0.8, label="training batches")
    axes.plot(elapsed, _smooth(bits), color="C0", label="training, smoothed")
    axes.axhline(
        heldout_bits_per_byte,
        color="C3",
        linewidth=2,
        label=f"held out: {heldout_bits_per_byte:.3f}",
    )
    end = max(elapsed, default=1.0)
    # Labels are spread apart where references lie closer than a line of text.
    lowest = -1.0
    for name, value in sorted(references.items(), key=lambda item: item[1]):
        axes.axhline(value, color="0.4", linewidth=0.6, linestyle=":")
        height = max(value, lowest + 0.16)
        label = f"{name.replace('_', ' ')} {value:.2f}"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(end * 1.02, height, label, fontsize=8, va="center", bbox=paper)
        lowest = height
    axes.set_xlim(0, end * 1.25)
    levels = [heldout_bits_per_byte, *references.values()]
    axes.set_ylim(max(0, min(levels) - 0.3), max(levels) + 1)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per byte")
    axes.set_title("Loss of the run; dotted: references on the same held-out bytes")
    axes.legend(loc="upper center")
    with writing(path):
        figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """Exponential moving average, without the pull of a start at zero."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth
