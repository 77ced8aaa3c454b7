"""Products with packed codes in float64 NumPy, the codes in full."""

import numpy as np


Array = np.ndarray

_LARGEST = 127


def matrix(codes: Array, scale: Array, group_size: int | None, middle: int) -> Array:
    """`s (c - m)`, with groups of neighbours along a row."""
    each = np.repeat(np.asarray(scale, np.float64), group_size or codes.shape[1], 1)
    return each[:, : codes.shape[1]] * (codes.astype(np.float64) - middle)


def round_tokens(x: Array) -> Array:
    """As many steps to either side as eight bits have, for each token by itself."""
    x = np.asarray(x, np.float64)
    step = np.max(np.abs(x), axis=1, keepdims=True) / _LARGEST
    return np.rint(x / step) * step
