"""Codes as the docstrings of `arrays.Affine` and `arrays.Ternary` define them.

Loops over groups in float64; nothing is packed.
"""

import numpy as np


def limits(bits: int, kind: str) -> tuple[int, int]:
    """Lowest and highest code, from the middle, or from zero for `"asymmetric"`."""
    if kind == "asymmetric":
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return (1 - half if kind == "narrow" else -half), half - 1


def range_of(values, kind: str, share: float = 1.0) -> tuple[float, float]:
    """Ends of what codes must reach: those of a share of the values."""
    if kind == "asymmetric":
        low, high = np.quantile(values, 1 - share), np.quantile(values, share)
        return min(0.0, float(low)), max(0.0, float(high))
    high = float(np.quantile(np.abs(values), share))
    return -high, high


def step_of(low: float, high: float, bits: int, kind: str) -> tuple[float, int]:
    """Step and zero point; a step of 1 where there is nothing to reach."""
    if kind == "asymmetric":
        count = 2**bits - 1
        # Not in steps, which are rounded: half of a range that is as wide on both sides
        # is half of it.
        share = -low / ((high - low) or 1.0)
        return (high - low) / count or 1.0, int(
            np.clip(np.rint(count * share), 0, count)
        )
    half = 2 ** (bits - 1)
    return high / (half - 1 if kind == "narrow" else half - 0.5) or 1.0, 0


def rounded(values, step: float, zero: int, bits: int, kind: str) -> np.ndarray:
    r"""$s\,(c - z)$ of the nearest codes."""
    low, high = limits(bits, kind)
    codes = np.clip(np.rint(np.asarray(values, np.float64) / step) + zero, low, high)
    return step * (codes - zero)


def squared_error(values, step: float, zero: int, bits: int, kind: str) -> float:
    return float(np.sum((rounded(values, step, zero, bits, kind) - values) ** 2))


def groups(weight, group_size: int | None, whole: bool = False) -> list[np.ndarray]:
    """Values that share a step: rows of a matrix cut up, or the matrix."""
    weight = np.asarray(weight, np.float64)
    if whole:
        return [weight.ravel()]
    width = group_size or weight.shape[-1]
    return [
        row[i : i + width] for row in weight for i in range(0, weight.shape[-1], width)
    ]


def ternary_codes(weight) -> tuple[np.ndarray, float]:
    """-1, 0 and 1, and the mean size of the values."""
    weight = np.asarray(weight, np.float64)
    mean = float(np.mean(np.abs(weight)))
    return np.clip(np.rint(weight / (mean or 1.0)), -1, 1), mean or 1.0


def ternary_scale(weight, codes, mean: float, scale: str) -> float:
    """What the codes are multiplied by."""
    weight = np.asarray(weight, np.float64)
    if scale == "absmean" or not np.any(codes):
        return mean
    if scale == "seed":
        return float(np.mean(np.abs(weight)) / np.mean(np.abs(codes)))
    return float(np.sum(weight * codes) / np.sum(codes * codes))


def learned_step_gradients(values, step: float, low: int, high: int, highest: int):
    """Derivatives of rounding in the values and in the step, and its factor.

    Equations 3 and 5 of Esser et al., arXiv 1902.08153, and the gradient scale of its
    section 2.2, for one step shared by all values.
    """
    ratio = np.asarray(values, np.float64) / step
    inside = (ratio > low) & (ratio < high)
    of_step = np.where(
        inside, np.rint(ratio) - ratio, np.where(ratio <= low, low, high)
    )
    return inside.astype(np.float64), of_step, 1 / np.sqrt(ratio.size * highest)


def round_tokens(x) -> np.ndarray:
    """Every row rounded to 127 steps either side of zero, of its largest value."""
    x = np.asarray(x, np.float64)
    largest = np.max(np.abs(x), axis=-1, keepdims=True)
    step = np.where(largest > 0, largest / 127, 1.0)
    return np.rint(x / step) * step
