"""Packed codes, and products with them, as NumPy loops in float64."""

import numpy as np


Array = np.ndarray

LARGEST = 127


def parts(bits: int) -> list[int]:
    """A number of bits as powers of two, the largest first: 7 is 4 + 2 + 1."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def packed_size(size: int, bits: int) -> int:
    """Whole bytes for every part."""
    return sum(int(np.ceil(size * width / 8)) for width in parts(bits))


def pack(codes: Array, bits: int) -> Array:
    """One row of codes, bit by bit."""
    packed, done = [], 0
    for width in parts(bits):
        each = 8 // width
        place = np.zeros(int(np.ceil(len(codes) * width / 8)), np.uint8)
        for i, code in enumerate(codes):
            part = (int(code) >> done) % 2**width
            place[i // each] += part * 2 ** (width * (i % each))
        packed.append(place)
        done += width
    return np.concatenate(packed)


def unpack(packed: Array, bits: int, size: int) -> Array:
    """One row of codes, read one after the other."""
    codes, start, done = np.zeros(size, np.int64), 0, 0
    for width in parts(bits):
        each = 8 // width
        for i in range(size):
            byte = int(packed[start + i // each])
            codes[i] += (byte >> (width * (i % each))) % 2**width * 2**done
        start += int(np.ceil(size * width / 8))
        done += width
    return codes


def pack_trits(trits: Array) -> Array:
    """One row of trits, five a byte."""
    packed = np.zeros(int(np.ceil(len(trits) / 5)), np.uint8)
    for i, trit in enumerate(trits):
        packed[i // 5] += trit * 3 ** (i % 5)
    return packed


def matrix(codes, scale, zero, *, bits, size, group_size=None) -> Array:
    """`s (c - z)`, one element after the other."""
    scale = np.asarray(scale, np.float64)
    whole = np.zeros((len(codes), size))
    for row, packed in enumerate(np.asarray(codes)):
        of_scale = row if len(scale) > 1 else 0
        for i, code in enumerate(unpack(packed, bits, size)):
            group = 0 if group_size is None else i // group_size
            middle = 2 ** (bits - 1) if zero is None else int(zero[of_scale, group])
            whole[row, i] = scale[of_scale, group] * (int(code) - middle)
    return whole


def token_codes(x: Array) -> tuple[Array, float]:
    """Whole numbers up to 127 for one token, and its step."""
    largest = float(np.max(np.abs(x)))
    step = largest / LARGEST if largest > 0 else 1.0
    return np.rint(np.asarray(x, np.float64) / step).astype(np.int64), step


def round_tokens(x: Array) -> Array:
    x = np.asarray(x, np.float64)
    rounded = np.zeros_like(x)
    for token in np.ndindex(x.shape[:-1]):
        codes, step = token_codes(x[token])
        rounded[token] = codes * step
    return rounded


def round_by_one_step(x, step) -> tuple[Array, Array]:
    """Tokens rounded to 127 steps at most, and which numbers lay within."""
    x, step = np.asarray(x, np.float64), float(step)
    rounded, inside = np.zeros_like(x), np.zeros(x.shape, bool)
    for place in np.ndindex(x.shape):
        steps = np.rint(x[place] / step)
        inside[place] = abs(steps) <= LARGEST
        rounded[place] = max(-LARGEST, min(LARGEST, steps)) * step
    return rounded, inside


def quant_matmul(
    x,
    codes,
    scale,
    zero=None,
    *,
    bits,
    group_size=None,
    activations=None,
    input_scale=None,
) -> Array:
    x = np.asarray(x, np.float64)
    if activations == "int8":
        x = round_tokens(x)
    if activations == "static_int8":
        x, _ = round_by_one_step(x, input_scale)
    size = x.shape[-1]
    whole = matrix(codes, scale, zero, bits=bits, size=size, group_size=group_size)
    return np.einsum("...i,oi->...o", x, whole)
