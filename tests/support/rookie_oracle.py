"""Rookies in float64 NumPy: every expert scored, every token and head on its own."""

import math

import numpy as np
from support import expert_oracle


def product_scores(layer, x) -> np.ndarray:
    """The scores of all experts, `(tokens, n_heads, num_rookies)`."""
    router = layer.router
    weight, keys = (
        np.asarray(w, np.float64) for w in (router.query.weight, router.keys)
    )
    count, d_key = math.isqrt(layer.num_rookies), keys.shape[-1]
    scores = np.zeros((len(x), layer.n_heads, layer.num_rookies))
    for token, row in enumerate(x):
        queries = (weight @ row).reshape(layer.n_heads, 2 * d_key)
        for head, query in enumerate(queries):
            if router.norm is not None:
                size = np.sqrt(np.mean(query**2) + router.norm.eps)
                query = query / size * np.asarray(router.norm.weight, np.float64)
            for expert in range(layer.num_rookies):
                first, second = divmod(expert, count)
                key = np.concatenate([keys[head, 0, first], keys[head, 1, second]])
                scores[token, head, expert] = query @ key
    return scores


def rookies(layer, x):
    """Output, choices and weights of rows, and load, balance loss and z-loss of all."""
    x = np.asarray(x, np.float64)
    if layer.routing == "product_key":
        scores = product_scores(layer, x)
    else:
        scores = (x @ np.asarray(layer.router.weight, np.float64).T)[:, None]
    tokens, heads, _ = scores.shape
    flat = scores.reshape(tokens * heads, -1)
    indices, weights = expert_oracle.route(flat, 0.0, layer.top_k)
    losses = expert_oracle.losses(flat, indices)
    indices, weights = (a.reshape(tokens, -1) for a in (indices, weights))
    arrays = {"x": x, "weights": weights, "gate": layer.up, "down": layer.down}
    y, _ = expert_oracle.experts(arrays, indices, layer.activation)
    return y, indices, weights, losses
