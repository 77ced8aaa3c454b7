"""Attention as NumPy loops in float64: one query, one head, one key after the other."""

import numpy as np
from support.numpy_oracles import Array, wide


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    is_causal: bool = False,
    window: int | None = None,
    mask: Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    scale: float | None = None,
) -> Array:
    """`kernels.attention`, every row of the batch on its own."""
    query, key, value = wide(query), wide(key), wide(value)
    *batch, queries, heads, d = query.shape
    keys, kv_heads = key.shape[-3:-1]
    out = np.zeros((*batch, queries, heads, value.shape[-1]))
    size = 1 / np.sqrt(d) if scale is None else scale

    def at(array, row, default):
        return default if array is None else array[row]

    for row in np.ndindex(*batch):
        q_at = at(query_positions, row, np.arange(queries))
        k_at = at(key_positions, row, np.arange(keys))
        q_of = at(query_segments, row, np.zeros(queries))
        k_of = at(key_segments, row, np.zeros(keys))
        shown = None
        if mask is not None:
            shown = np.broadcast_to(mask[row], (heads, queries, keys))
        for h, i in np.ndindex(heads, queries):
            group = h // (heads // kv_heads)
            scores = {}
            for j in range(keys):
                sees = q_of[i] == k_of[j] and q_of[i] >= 0
                sees = sees and (not is_causal or k_at[j] <= q_at[i])
                sees = sees and (window is None or abs(q_at[i] - k_at[j]) < window)
                sees = sees and (shown is None or bool(shown[h, i, j]))
                if sees:
                    scores[j] = size * float(query[row][i, h] @ key[row][j, group])
            if scores:
                highest = max(scores.values())
                total = sum(np.exp(s - highest) for s in scores.values())
                for j, s in scores.items():
                    weight = np.exp(s - highest) / total
                    out[row][i, h] += weight * value[row][j, group]
    return out


def turned(x: Array, position: int, base: float, frequencies: Array | None = None):
    """One head `(d,)`, its halves as complex numbers turned by the position."""
    half = x.shape[-1] // 2
    if frequencies is None:
        frequencies = np.asarray([base ** (-i / half) for i in range(half)])
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([pairs.real, pairs.imag])


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def affine(layer, x: Array) -> Array:
    y = x @ wide(layer.weight).T
    return y if layer.bias is None else y + wide(layer.bias)


def attention_row(layer, x: Array) -> Array:
    """One document `(seq, d_model)` through an `Attention`."""
    x = wide(x)
    length = len(x)
    q = affine(layer.q_proj, x).reshape(length, layer.n_heads, layer.head_dim)
    k = affine(layer.k_proj, x).reshape(length, layer.n_kv_heads, layer.head_dim)
    v = affine(layer.v_proj, x).reshape(length, layer.n_kv_heads, layer.head_dim)
    if layer.q_norm is not None:
        q = rms_norm(q, wide(layer.q_norm.weight), layer.q_norm.eps)
        k = rms_norm(k, wide(layer.k_norm.weight), layer.k_norm.eps)
    if layer.rope_enabled:
        q, k = (_turned_heads(x, layer.rope_base) for x in (q, k))
    y = attention(q, k, v, is_causal=layer.is_causal, window=layer.window)
    return affine(layer.o_proj, y.reshape(length, -1))


def decoupled_row(layer, x: Array) -> Array:
    """One document through a `DecoupledAttention`: two scores, summed by hand."""
    x = wide(x)
    length, heads = len(x), layer.n_heads
    group = heads // layer.n_kv_heads
    q_sem, q_geo = (
        affine(m, x).reshape(length, heads, -1) for m in (layer.q_sem, layer.q_geo)
    )
    k_sem, k_geo, v = (
        affine(m, x).reshape(length, layer.n_kv_heads, -1)
        for m in (layer.k_sem, layer.k_geo, layer.v_proj)
    )
    if layer.rope_enabled:
        q_geo, k_geo = (_turned_heads(x, layer.rope_base) for x in (q_geo, k_geo))
    out = np.zeros((length, heads, v.shape[-1]))
    for h in range(heads):
        g = 0.5 if layer.gate is None else 1 / (1 + np.exp(-wide(layer.gate)[h]))
        sem = q_sem[:, h] @ k_sem[:, h // group].T / np.sqrt(q_sem.shape[-1])
        geo = q_geo[:, h] @ k_geo[:, h // group].T / np.sqrt(q_geo.shape[-1])
        scores = 2 * g * sem + (2 - 2 * g) * geo
        for i in range(length):
            first = 0 if layer.window is None else max(0, i - layer.window + 1)
            last = i + 1 if layer.is_causal else length
            weights = np.exp(scores[i, first:last] - np.max(scores[i, first:last]))
            out[i, h] = weights @ v[first:last, h // group] / np.sum(weights)
    return affine(layer.o_proj, out.reshape(length, -1))


def _turned_heads(x: Array, base: float) -> Array:
    out = np.empty_like(x)
    for i, h in np.ndindex(x.shape[:2]):
        out[i, h] = turned(x[i, h], i, base)
    return out
