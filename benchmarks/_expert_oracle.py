"""Gated experts in float64 NumPy, with their gradients, one expert after the other."""

import numpy as np


Array = np.ndarray


def experts(
    indices: Array, x: Array, weights: Array, gate: Array, up: Array, down: Array
) -> Array:
    """The weighted sum of every token's experts, silu on their gates."""
    x, weights, gate, up, down = _wide(x, weights, gate, up, down)
    y = np.zeros_like(x)
    for expert in range(len(gate)):
        tokens, ranks = np.nonzero(indices == expert)
        g, u = x[tokens] @ gate[expert].T, x[tokens] @ up[expert].T
        out = (g * _sigmoid(g) * u) @ down[expert].T
        np.add.at(y, tokens, weights[tokens, ranks][:, None] * out)
    return y


def experts_gradients(
    indices: Array,
    x: Array,
    weights: Array,
    gate: Array,
    up: Array,
    down: Array,
    dy: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and the gradients of sum(dy y) in everything but the indices."""
    x, weights, gate, up, down, dy = _wide(x, weights, gate, up, down, dy)
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dgate, dup, ddown = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for expert in range(len(gate)):
        tokens, ranks = np.nonzero(indices == expert)
        seen, share = x[tokens], weights[tokens, ranks][:, None]
        g, u = seen @ gate[expert].T, seen @ up[expert].T
        s = _sigmoid(g)
        hidden = g * s * u
        out = hidden @ down[expert].T
        np.add.at(y, tokens, share * out)
        np.add.at(dweights, (tokens, ranks), np.sum(dy[tokens] * out, axis=-1))
        dout = share * dy[tokens]
        ddown[expert] = dout.T @ hidden
        dhidden = dout @ down[expert]
        dg, du = dhidden * u * s * (1 + g * (1 - s)), dhidden * g * s
        dgate[expert], dup[expert] = dg.T @ seen, du.T @ seen
        np.add.at(dx, tokens, dg @ gate[expert] + du @ up[expert])
    return y, (dx, dweights, dgate, dup, ddown)


def _sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def _wide(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)
