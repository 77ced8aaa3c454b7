"""BitNet b1.58 and affine codes in float64 NumPy, one value after the other."""

import numpy as np
from support.numpy_oracles import Array, rms_norm, wide


def rounded_token(x: Array, bits: int = 8) -> Array:
    """Each value of one token to the nearest of `2^bits - 1` around zero."""
    most = 2 ** (bits - 1) - 1
    largest = max(abs(value) for value in x)
    step = largest / most if largest > 0 else 1.0
    return np.array([step * round(value / step) for value in x])


def ternary(weight: Array) -> tuple[Array, float]:
    """-1, 0 and 1, and the mean size, one matrix."""
    gamma = sum(abs(value) for value in weight.ravel()) / weight.size or 1.0
    codes = np.zeros(weight.shape)
    for at in np.ndindex(weight.shape):
        # The nearest of three: halves go to zero, which is even.
        if abs(weight[at]) > gamma / 2:
            codes[at] = 1.0 if weight[at] > 0 else -1.0
    return codes, gamma


def affine_row(row: Array, bits: int, symmetric: bool, narrow: bool):
    """Codes, step and zero point of values that share a step."""
    if symmetric:
        largest = max(abs(value) for value in row)
        most = 2 ** (bits - 1) - 1
        step = largest / most if narrow else largest / (most + 0.5)
        least, zero = (-most if narrow else -most - 1), 0
    else:
        low, high = min(0, *row), max(0, *row)
        step, least, most = (high - low) / (2**bits - 1), 0, 2**bits - 1
        zero = round(-low / step) if step > 0 else 0
    step = step or 1.0
    codes = [min(max(round(value / step) + zero, least), most) for value in row]
    return np.array(codes), step, zero


def bitnet(x: Array, weight: Array, norm: Array, eps: float = 1e-5) -> Array:
    """`(tokens, in)` to `(tokens, out)`, one product after the other."""
    codes, gamma = ternary(wide(weight))
    y = np.zeros((len(x), len(codes)))
    for t, token in enumerate(rms_norm(x, wide(norm), eps)):
        rounded = rounded_token(token)
        for o, row in enumerate(codes):
            y[t, o] = gamma * sum(
                c * value for c, value in zip(row, rounded, strict=True)
            )
    return y
