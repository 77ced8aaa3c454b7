"""The operations of the library as plain NumPy loops in float64.

They are written from the formulas alone, one time step after the other, and share
nothing with the library. They are slow on purpose: only a loop that can be read line by
line can be trusted to judge a fast kernel.
"""

from collections.abc import Callable, Mapping

import numpy as np


Array = np.ndarray


def wide(values: object) -> Array:
    """`values` as float64, or as complex128 if they are complex."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.complexfloating):
        return array.astype(np.complex128)
    return array.astype(np.float64)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(0.0, x)


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), without overflow."""
    return x * np.exp(-np.logaddexp(0.0, -x))


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def gelu(x: Array) -> Array:
    """The tanh approximation of the Gaussian error linear unit."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def identity(x: Array) -> Array:
    return x


ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    "silu": silu,
    "relu": relu,
    "gelu": gelu,
    None: identity,
}


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """The Mamba-1 recurrence, one row and one step at a time."""
    u, delta, A, B, C = (wide(value) for value in (u, delta, A, B, C))
    batch, seq, d_inner, d_state = u.shape[:-2], u.shape[-2], u.shape[-1], A.shape[-1]
    y = np.zeros((*batch, seq, d_inner))
    final_state = np.zeros((*batch, d_inner, d_state))
    for row in np.ndindex(batch):
        h = np.zeros((d_inner, d_state))
        if initial_state is not None:
            h = wide(initial_state)[row].copy()
        for t in range(seq):
            if reset is not None and reset[(*row, t)]:
                h = np.zeros((d_inner, d_state))
            dt = delta[(*row, t)]
            if delta_bias is not None:
                dt = dt + wide(delta_bias)
            if delta_softplus:
                dt = softplus(dt)
            for n in range(d_state):
                decay = np.exp(dt * A[:, n])
                h[:, n] = decay * h[:, n] + dt * B[(*row, t, n)] * u[(*row, t)]
                y[(*row, t)] += C[(*row, t, n)] * h[:, n]
            if D is not None:
                y[(*row, t)] += wide(D) * u[(*row, t)]
            if z is not None:
                y[(*row, t)] *= silu(wide(z)[(*row, t)])
        final_state[row] = h
    return y, final_state


def linear_recurrence(
    a: Array,
    x: Array,
    *,
    initial_state: Array | None = None,
    reset: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """h = a h + x, one row and one step at a time, forwards or backwards in time."""
    a, x = wide(a), wide(x)
    batch, seq, d = x.shape[:-2], x.shape[-2], x.shape[-1]
    dtype = np.result_type(a, x)
    h_all = np.zeros((*batch, seq, d), dtype)
    final_state = np.zeros((*batch, d), dtype)
    for row in np.ndindex(batch):
        h = np.zeros((d,), dtype)
        if initial_state is not None:
            h = wide(initial_state)[row].astype(dtype)
        for step in range(seq):
            t = seq - 1 - step if reverse else step
            if reset is not None and reset[(*row, t)]:
                h = np.zeros((d,), dtype)
            h = a[(*row, t)] * h + x[(*row, t)]
            h_all[(*row, t)] = h
        final_state[row] = h
    return h_all, final_state


def ssd(
    x: Array,
    log_decay: Array,
    B: Array,
    C: Array,
    *,
    coefficient: Array | None = None,
    initial_state: Array | None = None,
    reset: Array | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """The Mamba-2 recurrence, one row, head and step at a time; there are no chunks."""
    x, log_decay, B, C = (wide(value) for value in (x, log_decay, B, C))
    (*batch, seq, n_heads, head_dim), (n_groups, d_state) = x.shape, B.shape[-2:]
    y = np.zeros(x.shape)
    final_state = np.zeros((*batch, n_heads, head_dim, d_state))
    for row in np.ndindex(tuple(batch)):
        for head in range(n_heads):
            group = head // (n_heads // n_groups)
            h = np.zeros((head_dim, d_state))
            if initial_state is not None:
                h = wide(initial_state)[(*row, head)].copy()
            for t in range(seq):
                if reset is not None and reset[(*row, t)]:
                    h = np.zeros((head_dim, d_state))
                new = np.outer(x[(*row, t, head)], B[(*row, t, group)])
                if coefficient is not None:
                    new = wide(coefficient)[(*row, t, head)] * new
                h = np.exp(log_decay[(*row, t, head)]) * h + new
                y[(*row, t, head)] = h @ C[(*row, t, group)]
            final_state[(*row, head)] = h
    return y, final_state


def documents(segment_ids: Array) -> list[list[int]]:
    """The positions of the documents of one row, padding left out.

    A document ends where the id differs from that of the previous token that is not
    padding; an id that comes back later starts a new document.
    """
    found: list[list[int]] = []
    previous = None
    for t, identifier in enumerate(segment_ids.tolist()):
        if identifier < 0:
            continue
        if identifier != previous:
            found.append([])
        found[-1].append(t)
        previous = identifier
    return found


def _conv_last_token(
    history: list[Array], weight: Array, bias: Array | None, dilation: int, groups: int
) -> Array:
    """The output at the last token of `history`, a list of inputs, oldest first."""
    c_out, c_in_group, width = weight.shape
    c_out_group = c_out // groups
    y = np.zeros((c_out,)) if bias is None else bias.copy()
    for o in range(c_out):
        first = (o // c_out_group) * c_in_group
        for k in range(width):
            position = len(history) - 1 - (width - 1 - k) * dilation
            if position >= 0:
                y[o] += weight[o, :, k] @ history[position][first : first + c_in_group]
    return y


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    dilation: int = 1,
    groups: int = 1,
    initial_state: Array | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Array]:
    """A causal convolution that runs every document on its own, padding removed.

    The first document of a row continues from `initial_state`. The final state holds
    the last inputs of the last document, zeros before its start.
    """
    x, weight = wide(x), wide(weight)
    bias = None if bias is None else wide(bias)
    batch, seq, c_in = x.shape[:-2], x.shape[-2], x.shape[-1]
    memory = (weight.shape[-1] - 1) * dilation
    y = np.zeros((*batch, seq, weight.shape[0]))
    final_state = np.zeros((*batch, memory, c_in))
    for row in np.ndindex(batch):
        history = [np.zeros(c_in)] * memory
        if initial_state is not None:
            history = list(wide(initial_state)[row])
        ids = (
            np.zeros(seq, int) if segment_ids is None else np.asarray(segment_ids)[row]
        )
        for number, positions in enumerate(documents(ids)):
            if number > 0:
                history = [np.zeros(c_in)] * memory
            for t in positions:
                history = [*history, x[(*row, t)]]
                y[(*row, t)] = _conv_last_token(history, weight, bias, dilation, groups)
        final_state[row] = np.reshape(history[len(history) - memory :], (memory, c_in))
    if activation == "silu":
        y = silu(y)
    return y, final_state


def rms_norm(x: Array, weight: Array | None = None, eps: float = 1e-5) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = wide(x)
    y = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        total = 0.0
        for value in x[row]:
            total += value * value
        y[row] = x[row] / np.sqrt(total / x.shape[-1] + eps)
    return y if weight is None else y * wide(weight)


def layer_norm(
    x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    x = wide(x)
    y = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        centred = x[row] - sum(x[row]) / x.shape[-1]
        variance = sum(value * value for value in centred) / x.shape[-1]
        y[row] = centred / np.sqrt(variance + eps)
    if weight is not None:
        y = y * wide(weight)
    return y if bias is None else y + wide(bias)


def sinusoidal_positions(positions: object, d_model: int, base: float = 10000.0):
    """Sines at even channels, cosines at odd ones; one number after the other.

    In long double: a far position times a frequency is no float64.
    """
    where = np.asarray(positions)
    out = np.zeros((*where.shape, d_model), np.longdouble)
    for index in np.ndindex(out.shape):
        exponent = np.longdouble(-2 * (index[-1] // 2)) / d_model
        angle = np.longdouble(where[index[:-1]]) * np.longdouble(base) ** exponent
        out[index] = np.sin(angle) if index[-1] % 2 == 0 else np.cos(angle)
    return out.astype(np.float64)


def _mamba_document(
    params: Mapping[str, Array], x: Array, activation: str | None
) -> Array:
    """One document `(seq, d_model)` through the layer, from empty states."""
    p = {name: wide(value) for name, value in params.items()}
    d_inner, d_state = p["A_log"].shape
    dt_rank = p["dt_proj.weight"].shape[-1]
    zeros = np.zeros(())
    projected = x @ p["in_proj.weight"].T + p.get("in_proj.bias", zeros)
    hidden, gate = projected[:, :d_inner], projected[:, d_inner:]
    hidden, _ = causal_conv(
        hidden, p["conv1d.weight"], p.get("conv1d.bias"), groups=d_inner
    )
    hidden = ACTIVATIONS[activation](hidden)
    selected = hidden @ p["x_proj.weight"].T
    dt = selected[:, :dt_rank]
    B = selected[:, dt_rank : dt_rank + d_state]
    C = selected[:, dt_rank + d_state :]
    delta = softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    y, _ = selective_scan(hidden, delta, -np.exp(p["A_log"]), B, C, p["D"], z=gate)
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", zeros)


def mamba_layer(
    params: Mapping[str, Array],
    x: Array,
    *,
    segment_ids: Array | None = None,
    activation: str | None = "silu",
) -> Array:
    """The Mamba-1 layer, with the parameter names and shapes of Hugging Face.

    `params` holds `in_proj.weight` (2 d_inner, d_model), `conv1d.weight`
    (d_inner, 1, d_conv), `x_proj.weight` (dt_rank + 2 d_state, d_inner),
    `dt_proj.weight` (d_inner, dt_rank), `dt_proj.bias`, `A_log` (d_inner, d_state),
    `D`, `out_proj.weight` (d_model, d_inner), and if the layer has them `conv1d.bias`,
    `in_proj.bias`, `out_proj.bias`. `activation` follows the convolution; the gate is
    always SiLU. Packed documents run separately; padding gives zero.
    """
    x = wide(x)
    batch, seq = x.shape[:-2], x.shape[-2]
    y = np.zeros((*batch, seq, wide(params["out_proj.weight"]).shape[0]))
    for row in np.ndindex(batch):
        ids = (
            np.zeros(seq, int) if segment_ids is None else np.asarray(segment_ids)[row]
        )
        for positions in documents(ids):
            y[row][positions] = _mamba_document(params, x[row][positions], activation)
    return y
