"""The operations in float64 NumPy, with their gradients, one token after the other.

Written from the formulas, apart from the library: a timing is worth nothing if what was
timed computes something else.
"""

import numpy as np


Array = np.ndarray


def selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array
) -> Array:
    """`y` of h_t = exp(d_t A) h_{t-1} + d_t B_t u_t, y_t = C_t h_t + D u_t."""
    u, delta, A, B, C, D = _wide(u, delta, A, B, C, D)
    h = np.zeros((u.shape[0], *A.shape))
    y = np.empty_like(u)
    for t in range(u.shape[1]):
        h = _next_state(h, u[:, t], delta[:, t], A, B[:, t])
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t])
    return y + D * u


def selective_scan_gradients(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    dy: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """`y`, and the gradients of sum(dy y) in all six inputs."""
    u, delta, A, B, C, D, dy = _wide(u, delta, A, B, C, D, dy)
    rows, seq, _ = u.shape
    h = np.zeros((seq + 1, rows, *A.shape))
    for t in range(seq):
        h[t + 1] = _next_state(h[t], u[:, t], delta[:, t], A, B[:, t])
    y = np.einsum("tbdn,btn->btd", h[1:], C) + D * u
    du, ddelta, dB, dC = D * dy, np.zeros_like(u), np.zeros_like(B), np.zeros_like(C)
    dA = np.zeros_like(A)
    dh = np.zeros_like(h[0])
    for t in reversed(range(seq)):
        step, x = delta[:, t], u[:, t]
        dh += dy[:, t, :, None] * C[:, t, None, :]
        dC[:, t] = np.einsum("bd,bdn->bn", dy[:, t], h[t + 1])
        into = np.einsum("bdn,bn->bd", dh, B[:, t])
        du[:, t] += step * into
        dB[:, t] = np.einsum("bdn,bd->bn", dh, step * x)
        decay = np.exp(step[..., None] * A)
        exponent = dh * h[t] * decay
        ddelta[:, t] = x * into + np.einsum("bdn,dn->bd", exponent, A)
        dA += np.einsum("bdn,bd->dn", exponent, step)
        dh *= decay
    return y, (du, ddelta, dA, dB, dC, np.einsum("btd,btd->d", dy, u))


def selective_scan_hvp(
    inputs: tuple[Array, ...], dy: Array, direction: tuple[Array, ...]
) -> tuple[Array, ...]:
    """The derivative of the gradients along `direction`, by a central difference.

    In float64 its error, of about 1e-9, is far below that of any float32 result.
    """
    small = 1e-5

    def gradients(sign):
        moved = [
            x + sign * small * v
            for x, v in zip(_wide(*inputs), _wide(*direction), strict=True)
        ]
        u, delta, A, B, C, D = moved
        return selective_scan_gradients(u, delta, A, B, C, D, dy)[1]

    pairs = zip(gradients(1), gradients(-1), strict=True)
    return tuple((above - below) / (2 * small) for above, below in pairs)


def linear_recurrence(a: Array, x: Array) -> Array:
    """`h` of h_t = a_t h_{t-1} + x_t."""
    a, x = _wide(a, x)
    h = np.empty_like(x)
    last = np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        last = a[:, t] * last + x[:, t]
        h[:, t] = last
    return h


def linear_recurrence_gradients(
    a: Array, x: Array, dy: Array
) -> tuple[Array, tuple[Array, Array]]:
    """`h`, and the gradients of sum(dy h) in `a` and `x`."""
    a, x, dy = _wide(a, x, dy)
    h = linear_recurrence(a, x)
    before = np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    # The gradient in x is the same recurrence, run from the last token to the first.
    later = np.concatenate([a[:, 1:], np.zeros_like(a[:, :1])], axis=1)
    dx = linear_recurrence(later[:, ::-1], dy[:, ::-1])[:, ::-1]
    return h, (dx * before, dx)


def causal_conv(x: Array, weight: Array, bias: Array) -> Array:
    """The depthwise causal convolution; `weight` is `(channels, 1, width)`."""
    x, weight, bias = _wide(x, weight, bias)
    return sum(
        (_delayed(x, lag) * tap for lag, tap in _taps(weight)), np.zeros_like(x) + bias
    )


def causal_conv_gradients(
    x: Array, weight: Array, bias: Array, dy: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    """`y`, and the gradients of sum(dy y) in `x`, `weight` and `bias`."""
    x, weight, bias, dy = _wide(x, weight, bias, dy)
    dx = np.zeros_like(x)
    dweight = []
    for lag, tap in _taps(weight):
        dx += _delayed(dy[:, ::-1], lag)[:, ::-1] * tap
        dweight.append(np.einsum("btc,btc->c", dy, _delayed(x, lag)))
    gradients = (dx, np.stack(dweight, axis=-1)[:, None], dy.sum((0, 1)))
    return causal_conv(x, weight, bias), gradients


def mamba(weights: dict[str, Array], x: Array) -> Array:
    """A Mamba layer with silu and without projection biases, from its parameters."""
    names = ("in_proj", "conv", "conv_bias", "x_proj", "dt_proj", "dt_bias")
    w_in, w_conv, b_conv, w_x, w_dt, b_dt = _wide(*(weights[name] for name in names))
    A_log, D, w_out, x = _wide(weights["A_log"], weights["D"], weights["out_proj"], x)
    rank, states = w_dt.shape[1], A_log.shape[1]
    u, z = np.split(x @ w_in.T, 2, axis=-1)
    u = _silu(causal_conv(u, w_conv, b_conv))
    steps, B, C = np.split(u @ w_x.T, [rank, rank + states], axis=-1)
    delta = np.logaddexp(0.0, steps @ w_dt.T + b_dt)
    y = selective_scan(u, delta, -np.exp(A_log), B, C, D)
    return (y * _silu(z)) @ w_out.T


def _next_state(h, x, step, A, B):
    decay = np.exp(step[..., None] * A)
    return decay * h + (step * x)[..., None] * B[:, None, :]


def _taps(weight):
    width = weight.shape[-1]
    return [(width - 1 - k, weight[:, 0, k]) for k in range(width)]


def _delayed(x, lag):
    return np.pad(x, [(0, 0), (lag, 0), (0, 0)])[:, : x.shape[1]]


def _silu(x):
    return x * np.exp(-np.logaddexp(0.0, -x))


def _wide(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)
