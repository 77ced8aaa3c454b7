import bz2
import lzma
import zlib

import numpy as np
from jaxtyping import Float64, Int64, UInt8, UInt32


# A context of three bytes and the byte after it fill one uint32.
_MAX_ORDER = 3
# Bounds the memory of a sort, whatever the length of the text.
_CHUNK = 1 << 24


def reference_bits_per_byte(
    train: UInt8[np.ndarray, " train_bytes"],
    heldout: UInt8[np.ndarray, " heldout_bytes"],
) -> dict[str, float]:
    r"""What simple models need for the held-out bytes, to compare a trained one with.

    The n-grams count on `train` and predict `heldout`, see `ngram_probabilities`. The
    compressors never see `train`: each compresses the held-out bytes alone, at its
    highest level, and its size is taken whole, header included. That makes
    them a familiar yardstick rather than rivals under the same conditions.

    **Arguments:**

    - `train`: bytes to count on, at least one.
    - `heldout`: bytes to predict, at least one.

    **Returns:**

    Bits per held-out byte by name: `order0_ngram`, `order1_ngram`, `order2_ngram`,
    `order3_ngram`, `zlib`, `bz2`, `lzma`.

    **Raises:**

    - `ValueError`: an array is empty, or is not one axis of `uint8`.

    **Example:**

        references = reference_bits_per_byte(corpus.train, corpus.heldout)
        print(f"from the last three bytes: {references['order3_ngram']:.3f}")
    """
    _check_bytes("heldout", heldout)
    probabilities = ngram_probabilities(train, heldout)
    bits = -np.log2(probabilities).mean(axis=1)
    references = {f"order{k}_ngram": float(bits[k]) for k in range(len(bits))}
    text = heldout.tobytes()
    compressed = {
        "zlib": zlib.compress(text, level=9),
        "bz2": bz2.compress(text, compresslevel=9),
        "lzma": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, packed in compressed.items():
        references[name] = 8 * len(packed) / len(text)
    return references


def ngram_probabilities(
    train: UInt8[np.ndarray, " train_bytes"],
    text: UInt8[np.ndarray, " text_bytes"],
) -> Float64[np.ndarray, "orders text_bytes"]:
    r"""Probability of each byte of `text` under n-grams of order 0 to 3.

    An n-gram of order $k$ sees the $k$ bytes before the one that it predicts. Its
    counts on `train` are mixed with the next lower order's prediction, by method C of
    Witten and Bell:

    $$p_k(c \mid h) = \frac{N(h c) + T(h)\, p_{k-1}(c \mid h')}{N(h) + T(h)}$$

    where $N(hc)$ is how often byte $c$ follows the history $h$ in `train`, $N(h) =
    \sum_c N(hc)$, $T(h)$ is the number of different bytes that follow $h$, and $h'$ is
    $h$ without its oldest byte. Below order 0 stands the uniform $p_{-1} = 1/256$. A
    history that never occurs has $N(h) = T(h) = 0$ and takes $p_{k-1}$ unchanged, and
    so do the first $k$ bytes of `text`, whose history is shorter than $k$.

    I. H. Witten and T. C. Bell, "The zero-frequency problem: estimating the
    probabilities of novel events in adaptive text compression", IEEE Transactions on
    Information Theory 37(4), 1991; T. C. Bell, J. G. Cleary and I. H. Witten, "Text
    Compression", Prentice Hall, 1990.

    **Arguments:**

    - `train`: bytes to count on, at least one.
    - `text`: bytes to predict, at least one.

    **Returns:**

    Row $k$ holds $p_k$ for every byte of `text`.

    **Raises:**

    - `ValueError`: an array is empty, or is not one axis of `uint8`.
    """
    _check_bytes("train", train)
    _check_bytes("text", text)
    rows = []
    lower = np.full(text.size, 1 / 256)
    for order, (grams, counts) in enumerate(_count_grams(train)):
        histories, totals = _merge(grams >> 8, counts)
        _, kinds = _merge(grams >> 8, np.ones_like(counts))
        queries = _pack(text, order + 1)
        seen = _look_up(grams, counts, queries)
        total = _look_up(histories, totals, queries >> 8)
        kind = _look_up(histories, kinds, queries >> 8)
        known = total > 0
        lower = lower.copy()
        below = lower[order:]
        below[known] = ((seen + kind * below) / np.maximum(total + kind, 1))[known]
        rows.append(lower)
    return np.stack(rows)


def _check_bytes(name: str, data: UInt8[np.ndarray, " n"]) -> None:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(
            f"`{name}` must be one axis of uint8, got shape {data.shape} of "
            f"{data.dtype}. Read bytes with `np.frombuffer(text, np.uint8)`."
        )
    if data.size == 0:
        raise ValueError(f"`{name}` is empty; at least one byte is needed.")


def _pack(data: UInt8[np.ndarray, " n"], length: int) -> UInt32[np.ndarray, " m"]:
    """Every run of `length` bytes as one integer, the oldest byte the highest."""
    runs = max(data.size - length + 1, 0)
    packed = data[:runs].astype(np.uint32)
    for offset in range(1, length):
        packed <<= 8
        packed |= data[offset : offset + runs]
    return packed


def _merge(
    keys: UInt32[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> tuple[UInt32[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Each different key once, sorted, with the sum of its counts."""
    if keys.size == 0:
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[starts], np.add.reduceat(counts, starts)


def _count_grams(
    train: UInt8[np.ndarray, " n"],
) -> list[tuple[UInt32[np.ndarray, " _"], Int64[np.ndarray, " _"]]]:
    """For lengths 1 to 4: the different runs of bytes, sorted, and their counts."""
    longest = _MAX_ORDER + 1
    grams, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    for start in range(0, train.size, _CHUNK):
        chunk = _pack(train[start : start + _CHUNK + longest - 1], longest)
        new, times = np.unique(chunk, return_counts=True)
        grams = np.concatenate([grams, new])
        counts = np.concatenate([counts, times.astype(np.int64)])
        if start:
            grams, counts = _merge(grams, counts)
    tables = [(grams, counts)]
    # Only the longest runs are sorted: a shorter run is the beginning of a longer one
    # wherever it occurs, except at the very end of the text.
    for length in range(longest - 1, 0, -1):
        last = _pack(train[max(train.size - length, 0) :], length)
        grams = np.concatenate([grams >> 8, last])
        counts = np.concatenate([counts, np.ones(last.size, np.int64)])
        grams, counts = _merge(grams, counts)
        tables.append((grams, counts))
    return tables[::-1]


def _look_up(
    keys: UInt32[np.ndarray, " n"],
    values: Int64[np.ndarray, " n"],
    queries: UInt32[np.ndarray, " m"],
) -> Int64[np.ndarray, " m"]:
    """The value of each query's key, 0 for a query that is no key."""
    if keys.size == 0:
        return np.zeros(queries.size, np.int64)
    index = np.minimum(np.searchsorted(keys, queries), keys.size - 1)
    return np.where(keys[index] == queries, values[index], 0)
