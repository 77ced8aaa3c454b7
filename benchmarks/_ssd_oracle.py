"""Mamba-2 in float64 NumPy: its scan as one matrix over all tokens, and its layer.

The matrix of a head holds the weight of every earlier token in every later one. It is
quadratic in the length, and shares nothing with a scan over chunks.
"""

import numpy as np

from ._oracle import causal_conv


Array = np.ndarray


def ssd(x: Array, dt: Array, A: Array, B: Array, C: Array) -> Array:
    """`y` of h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t.

    `x` is `(batch, seq, heads, head_dim)`, `dt` without the last axis, `A` `(heads,)`,
    `B` and `C` `(batch, seq, groups, d_state)`.
    """
    x, dt, A, B, C = (np.asarray(v, np.float64) for v in (x, dt, A, B, C))
    y = np.empty_like(x)
    for row, head, group in _heads(x, B):
        weights = _decays(dt[row, :, head] * A[head])
        weights *= C[row, :, group] @ B[row, :, group].T
        y[row, :, head] = weights @ (dt[row, :, head, None] * x[row, :, head])
    return y


def ssd_gradients(
    x: Array, dt: Array, A: Array, B: Array, C: Array, dy: Array
) -> tuple[Array, tuple[Array, ...]]:
    """`y`, and the gradients of sum(dy y) in all five inputs."""
    x, dt, A, B, C, dy = (np.asarray(v, np.float64) for v in (x, dt, A, B, C, dy))
    y = np.empty_like(x)
    dx, ddt, dA, dB, dC = (np.zeros_like(v) for v in (x, dt, A, B, C))
    for row, head, group in _heads(x, B):
        at, of = (row, slice(None), head), (row, slice(None), group)
        step = dt[at]
        decays = _decays(step * A[head])
        scores = C[of] @ B[of].T
        inputs = step[:, None] * x[at]
        y[at] = decays * scores @ inputs
        dinputs = (decays * scores).T @ dy[at]
        dweights = dy[at] @ inputs.T
        dscores = dweights * decays
        dC[of] += dscores @ B[of]
        dB[of] += dscores.T @ C[of]
        # An exponent counts from the token after the one that is read.
        exponents = dscores * scores
        dtotal = exponents.sum(1) - exponents.sum(0)
        dexponent = np.cumsum(dtotal[::-1])[::-1]
        dx[at] = step[:, None] * dinputs
        ddt[at] = np.sum(dinputs * x[at], -1) + dexponent * A[head]
        dA[head] += dexponent @ step
    return y, (dx, ddt, dA, dB, dC)


def mamba2(weights: dict[str, Array], x: Array) -> Array:
    """A Mamba-2 layer of one group with silu and no projection biases."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = np.asarray(x, np.float64)
    n_heads, d_inner = w["A_log"].shape[0], w["out_proj"].shape[1]
    channels = w["conv"].shape[0]
    d_state = (channels - d_inner) // 2
    projected = x @ w["in_proj"].T
    z, mixed, dt = np.split(projected, [d_inner, d_inner + channels], axis=-1)
    mixed = _silu(causal_conv(mixed, w["conv"], w["conv_bias"]))
    u, B, C = np.split(mixed, [d_inner, d_inner + d_state], axis=-1)
    u = u.reshape(*u.shape[:-1], n_heads, -1)
    dt = np.logaddexp(0.0, dt + w["dt_bias"])
    y = ssd(u, dt, -np.exp(w["A_log"]), B[:, :, None], C[:, :, None])
    y = (y + w["D"][:, None] * u).reshape(z.shape) * _silu(z)
    y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1e-5) * w["norm"]
    return y @ w["out_proj"].T


def _heads(x, B):
    each = x.shape[2] // B.shape[2]
    for row in range(x.shape[0]):
        for head in range(x.shape[2]):
            yield row, head, head // each


def _decays(exponent):
    """exp of the sums of exponents from each token, not counted, to each later one."""
    total = np.cumsum(exponent)
    lag = total[:, None] - total
    return np.exp(np.where(np.tri(exponent.size, dtype=bool), lag, -np.inf))


def _silu(x):
    return x * np.exp(-np.logaddexp(0.0, -x))
