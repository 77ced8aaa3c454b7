"""Experts in float64 NumPy, one token and one choice after the other."""

from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike
from scipy.special import erf, expit


ACTIVATIONS = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def gated_unit(x, maps, biases, act):
    """One token through one expert; gate, up (or `None`) and down in this order."""
    gate, up, down = maps
    hidden = act(gate @ x + biases[0])
    if up is not None:
        hidden = hidden * (up @ x + biases[1])
    return down @ hidden + biases[2]


def experts(
    arrays: Mapping[str, ArrayLike],
    indices: np.ndarray,
    activation="silu",
    places: int | None = None,
) -> tuple[np.ndarray, int]:
    """The weighted sum of every token's experts, and how many choices were dropped.

    With `places` an expert takes no more choices: first those of rank 0, token after
    token, then those of rank 1, and so on. Without an `up` experts have two matrices.
    """
    a = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    names = ("gate_bias", "up_bias", "down_bias")
    y, dropped = np.zeros_like(a["x"]), 0
    taken = np.zeros(len(a["gate"]), int)
    for rank in range(indices.shape[1]):
        for token, expert in enumerate(indices[:, rank]):
            if not 0 <= expert < len(taken):
                continue
            if places is not None and taken[expert] == places:
                dropped += 1
                continue
            taken[expert] += 1
            biases = [a[name][expert] if name in a else 0 for name in names]
            maps = [
                a[name][expert] if name in a else None
                for name in ("gate", "up", "down")
            ]
            out = gated_unit(a["x"][token], maps, biases, ACTIVATIONS[activation])
            y[token] += a["weights"][token, rank] * out
    return y, dropped


def softmax(logits):
    powers = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


def route(logits, bias, top_k, score="softmax", renormalize=True):
    """Chosen experts and their weights, token by token."""
    chosen, weights = [], []
    for row in np.asarray(logits, np.float64):
        scores = softmax(row) if score == "softmax" else expit(row)
        order = np.argsort(-(scores + bias), kind="stable")[:top_k]
        own = scores[order]
        chosen.append(order)
        weights.append(own / own.sum() if renormalize else own)
    return np.asarray(chosen), np.asarray(weights)


def losses(logits, indices, score="softmax"):
    """Load, balance loss and z-loss by their formulas."""
    logits = np.asarray(logits, np.float64)
    tokens, count = logits.shape
    load = np.zeros(count)
    for expert in indices.ravel():
        load[expert] += 1 / indices.size
    scores = softmax(logits) if score == "softmax" else expit(logits)
    shares = (scores / scores.sum(-1, keepdims=True)).mean(0)
    z = np.mean([np.log(np.sum(np.exp(row))) ** 2 for row in logits])
    return load, count * np.sum(load * shares), z
