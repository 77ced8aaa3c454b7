"""Causal attention in float64 NumPy, some queries of one head at a time."""

import numpy as np


Array = np.ndarray

# Queries whose scores are held at once.
_CHUNK = 256


def gradients(
    q: Array, k: Array, v: Array, dy: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    """The result, and the gradients of sum(dy y) in queries, keys and values.

    With the softmax w of a query's scores s = q k / sqrt(d): dv = w dy, and
    ds = w (dy v - sum over keys of w dy v).

    **Arguments:**

    - `q`, `k`, `v`, `dy`: `(batch, length, heads, width)`, all of as many heads.
    """
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    y, dq, dk, dv = (np.zeros_like(x) for x in (dy, q, k, v))
    scale = 1 / np.sqrt(q.shape[-1])
    length = q.shape[1]
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        at = (row, slice(None), head)
        for start in range(0, length, _CHUNK):
            end = min(start + _CHUNK, length)
            # No query of the chunk sees a key behind it.
            queries, keys = (row, slice(start, end), head), (row, slice(end), head)
            weights = _softmax(q[queries] @ k[keys].T * scale, start)
            y[queries] = weights @ v[keys]
            slopes = dy[queries] @ v[keys].T
            slopes -= np.sum(weights * slopes, axis=-1, keepdims=True)
            slopes *= weights * scale
            dq[queries] = slopes @ k[keys]
            dk[at][:end] += slopes.T @ q[queries]
            dv[at][:end] += weights.T @ dy[queries]
    return y, (dq, dk, dv)


def _softmax(scores: Array, start: int) -> Array:
    """Of queries from position `start` on, over the keys that each of them sees."""
    query = start + np.arange(scores.shape[0])[:, None]
    scores = np.where(np.arange(scores.shape[1]) <= query, scores, -np.inf)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)
