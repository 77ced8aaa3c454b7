"""The operations in float64 NumPy, with their gradients, one token after the other.

Written from the formulas, apart from the library: a timing is worth nothing if what was
timed computes something else.
"""

import numpy as np


Array = np.ndarray


# Tokens whose states are held at once: few, so that long sequences need little memory.
_CHUNK = 32


def selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array
) -> Array:
    """`y` of h_t = exp(d_t A) h_{t-1} + d_t B_t u_t, y_t = C_t h_t + D u_t."""
    u, delta, A, B, C, D = _wide(u, delta, A, B, C, D)
    h = np.zeros((u.shape[0], *A.shape))
    y = np.empty_like(u)
    for part in _chunks(u.shape[1]):
        _, states = _states(h, u[:, part], delta[:, part], A, B[:, part])
        y[:, part] = _read_out(states, C[:, part])
        h = states[:, -1]
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
    parts = _chunks(u.shape[1])
    entering = [np.zeros((u.shape[0], *A.shape))]
    for part in parts:
        last = _states(entering[-1], u[:, part], delta[:, part], A, B[:, part])[1]
        entering.append(last[:, -1])
    y, du, ddelta = np.empty_like(u), D * dy, np.empty_like(u)
    dA, dB, dC = np.zeros_like(A), np.empty_like(B), np.empty_like(C)
    dh = np.zeros_like(entering[0])
    for h, part in reversed(list(zip(entering, parts, strict=False))):
        x, step = u[:, part], delta[:, part]
        decay, states = _states(h, x, step, A, B[:, part])
        y[:, part] = _read_out(states, C[:, part])
        dC[:, part] = _over_channels(dy[:, part], states)
        dstates, dh = _state_gradients(dh, decay, dy[:, part], C[:, part])
        into = _read_out(dstates, B[:, part])
        du[:, part] += step * into
        dB[:, part] = _over_channels(step * x, dstates)
        before = np.concatenate([h[:, None], states[:, :-1]], axis=1)
        exponent = dstates * before * decay
        ddelta[:, part] = x * into + np.einsum("btdn,dn->btd", exponent, A)
        dA += np.einsum("btdn,btd->dn", exponent, step)
    return y + D * u, (du, ddelta, dA, dB, dC, np.einsum("btd,btd->d", dy, u))


def selective_scan_step(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    z: Array,
    delta_bias: Array,
    initial_state: Array,
) -> tuple[Array, Array]:
    """Output and state after one token, with softplus, skip weights and gate."""
    u, B, C, z, state = _wide(u, B, C, z, initial_state)
    step = np.logaddexp(0.0, np.add(delta, delta_bias, dtype=np.float64))
    state = _states(state, u[:, None], step[:, None], A, B[:, None])[1][:, 0]
    return (_read_out(state, C) + D * u) * _silu(z), state


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
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    return _mamba_parts(w, np.asarray(x, np.float64))["y"]


def mamba_gradients(
    weights: dict[str, Array], x: Array, dy: Array
) -> tuple[Array, tuple[dict[str, Array], Array]]:
    """The layer's output, and the gradients of sum(dy y) in its parameters and `x`."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x, dy = _wide(x, dy)
    parts = _mamba_parts(w, x)
    u, z, scan = parts["u"], parts["z"], parts["scan"]
    dgated = dy @ w["out_proj"]
    _, inner = selective_scan_gradients(*scan, dy=dgated * _silu(z))
    du, ddelta, dA, dB, dC, dD = inner
    # The slope of softplus is the sigmoid, 1 - exp(-softplus).
    dsteps = ddelta * -np.expm1(-scan[1])
    dmaps = np.concatenate([dsteps @ w["dt_proj"], dB, dC], axis=-1)
    du += dmaps @ w["x_proj"]
    _, (dconv_in, dconv, dconv_bias) = causal_conv_gradients(
        parts["conv_in"], w["conv"], w["conv_bias"], du * _silu_slope(parts["conv"])
    )
    din = np.concatenate([dconv_in, dgated * parts["scanned"] * _silu_slope(z)], -1)
    gradients = {
        "in_proj": _outer(din, x),
        "conv": dconv,
        "conv_bias": dconv_bias,
        "x_proj": _outer(dmaps, u),
        "dt_proj": _outer(dsteps, parts["steps"]),
        "dt_bias": dsteps.sum((0, 1)),
        "A_log": dA * scan[2],
        "D": dD,
        "out_proj": _outer(dy, parts["gated"]),
    }
    return parts["y"], (gradients, din @ w["in_proj"])


def language_model_loss(
    embedding: Array,
    layers: list[tuple[Array, dict[str, Array]]],
    norm: Array,
    tokens: Array,
) -> Array:
    """Mean cross-entropy of each next token, in nats, of a residual stack of Mambas.

    `layers` holds the norm's weights and the layer's; the table is also the head.
    """
    embedding, norm = _wide(embedding, norm)
    x = embedding[tokens[:, :-1]]
    for weight, layer in layers:
        x = x + mamba(layer, _rms_norm(x, weight))
    scores = _rms_norm(x, norm) @ embedding.T
    right = np.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return np.mean(np.logaddexp.reduce(scores, axis=-1) - right)


def _rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def _mamba_parts(w, x):
    """Everything on the way from a layer's input to its output, by name."""
    rank, states = w["dt_proj"].shape[1], w["A_log"].shape[1]
    conv_in, z = np.split(x @ w["in_proj"].T, 2, axis=-1)
    conv = causal_conv(conv_in, w["conv"], w["conv_bias"])
    u = _silu(conv)
    steps, B, C = np.split(u @ w["x_proj"].T, [rank, rank + states], axis=-1)
    delta = np.logaddexp(0.0, steps @ w["dt_proj"].T + w["dt_bias"])
    scan = (u, delta, -np.exp(w["A_log"]), B, C, w["D"])
    scanned = selective_scan(*scan)
    gated = scanned * _silu(z)
    return {
        "conv_in": conv_in,
        "conv": conv,
        "u": u,
        "z": z,
        "steps": steps,
        "scan": scan,
        "scanned": scanned,
        "gated": gated,
        "y": gated @ w["out_proj"].T,
    }


def _outer(left, right):
    """The gradient in a matrix that maps `right` to what has the gradient `left`."""
    return np.einsum("bti,btj->ij", left, right, optimize=True)


def _chunks(seq):
    return [slice(t, min(t + _CHUNK, seq)) for t in range(0, seq, _CHUNK)]


def _states(h, x, step, A, B):
    """Decays and states of a chunk of tokens, (rows, tokens, d_inner, d_state)."""
    decay = np.exp(step[..., None] * A)
    states = (step * x)[..., None] * B[:, :, None, :]
    for t in range(states.shape[1]):
        states[:, t] += decay[:, t] * h
        h = states[:, t]
    return decay, states


def _state_gradients(dh, decay, dy, C):
    """Gradients in the states of a chunk, and in the state that enters it."""
    found = dy[..., None] * C[:, :, None, :]
    for t in reversed(range(found.shape[1])):
        found[:, t] += dh
        dh = decay[:, t] * found[:, t]
    return found, dh


def _read_out(states, weights):
    return (states @ weights[..., None])[..., 0]


def _over_channels(weights, states):
    return (weights[..., None, :] @ states)[..., 0, :]


def _taps(weight):
    width = weight.shape[-1]
    return [(width - 1 - k, weight[:, 0, k]) for k in range(width)]


def _delayed(x, lag):
    return np.pad(x, [(0, 0), (lag, 0), (0, 0)])[:, : x.shape[1]]


def _silu(x):
    return x * _sigmoid(x)


def _silu_slope(x):
    return _sigmoid(x) * (1 + x * _sigmoid(-x))


def _sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def _wide(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)
