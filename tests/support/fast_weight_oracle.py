"""DeltaNet and Meta Linear Attention with their caches as NumPy loops."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from support import numpy_oracles as oracles
from support.mamba_oracle import Remembered
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import DeltaNet, MetaLinearAttention


class Settings(NamedTuple):
    """What the arrays do not tell; `most` is the greatest rate of the delta rule."""

    n_heads: int
    norm_eps: float
    most: float = 1.0
    temperature: float = 1.0


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    *,
    log_decay: Array | None = None,
    initial_state: Array | None = None,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """The gated delta rule, one row, head and token at a time."""
    q, k, v, beta = (wide(x) for x in (q, k, v, beta))
    (*batch, seq, n_heads, head_dim), width = k.shape, v.shape[-1]
    o = np.zeros(v.shape)
    final_state = np.zeros((*batch, n_heads, width, head_dim))
    for row in np.ndindex(*batch, n_heads):
        *place, head = row
        S = np.zeros((width, head_dim))
        if initial_state is not None:
            S = wide(initial_state)[row].copy()
        for t in range(seq):
            at = (*place, t, head)
            if reset is not None and reset[(*place, t)]:
                S = np.zeros((width, head_dim))
            if log_decay is not None:
                S = np.exp(wide(log_decay)[at]) * S
            S = S + beta[at] * np.outer(v[at] - S @ k[at], k[at])
            o[at] = S @ q[at]
        final_state[row] = S
    return o, final_state


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    *,
    initial_state: Array | None = None,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """Attention with a decay a channel, one row, head, token and channel at a time."""
    q, k, v, log_decay = (wide(x) for x in (q, k, v, log_decay))
    (*batch, seq, n_heads, head_dim), width = k.shape, v.shape[-1]
    o = np.zeros(v.shape)
    final_state = np.zeros((*batch, n_heads, width, head_dim))
    for row in np.ndindex(*batch, n_heads):
        *place, head = row
        S = np.zeros((width, head_dim))
        if initial_state is not None:
            S = wide(initial_state)[row].copy()
        for t in range(seq):
            at = (*place, t, head)
            if reset is not None and reset[(*place, t)]:
                S = np.zeros((width, head_dim))
            for d in range(head_dim):
                S[:, d] = np.exp(log_decay[at][d]) * S[:, d] + k[at][d] * v[at]
                o[at] += q[at][d] * S[:, d]
        final_state[row] = S
    return o, final_state


_DELTA_FIELDS: dict[str, Callable[[Any], Any]] = {
    "q": lambda layer: layer.q_proj.weight,
    "k": lambda layer: layer.k_proj.weight,
    "v": lambda layer: layer.v_proj.weight,
    "beta": lambda layer: layer.beta_proj.weight,
    "dt": lambda layer: layer.dt_proj and layer.dt_proj.weight,
    "dt_bias": lambda layer: layer.dt_bias,
    "A_log": lambda layer: layer.A_log,
    "gate": lambda layer: layer.gate_proj and layer.gate_proj.weight,
    "conv": lambda layer: layer.conv and layer.conv.weight,
    "conv_bias": lambda layer: layer.conv and layer.conv.bias,
    "norm": lambda layer: layer.norm.weight,
    "o": lambda layer: layer.o_proj.weight,
}
_META_FIELDS: dict[str, Callable[[Any], Any]] = {
    "conv": lambda layer: layer.conv.weight,
    "q": lambda layer: layer.q_proj.weight,
    "decay": lambda layer: layer.decay_proj.weight,
    "v": lambda layer: layer.v_proj.weight,
    "gate": lambda layer: layer.gate_proj.weight,
    "gate_bias": lambda layer: layer.gate_proj.bias,
    "augmentation": lambda layer: layer.augmentation,
    "o": lambda layer: layer.o_proj.weight,
}


def _fields(layer: DeltaNet | MetaLinearAttention) -> dict[str, Callable[[Any], Any]]:
    return _DELTA_FIELDS if isinstance(layer, DeltaNet) else _META_FIELDS


def settings(layer: DeltaNet | MetaLinearAttention) -> Settings:
    known = Settings(layer.n_heads, layer.norm.eps)
    if isinstance(layer, DeltaNet):
        return known._replace(most=2.0 if layer.negative_eigenvalues else 1.0)
    return known._replace(temperature=layer.temperature)


def parameters(layer: DeltaNet | MetaLinearAttention) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy arrays."""
    found = {name: field(layer) for name, field in _fields(layer).items()}
    return {name: np.asarray(v) for name, v in found.items() if v is not None}


def with_parameters(layer: Any, values: Mapping[str, Any]) -> Any:
    """The layer with other values, which may be traced, in place of its own."""
    for name, field in _fields(layer).items():
        if name in values:
            layer = eqx.tree_at(field, layer, jnp.asarray(values[name]))
    return layer


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _of_length_one(x: Array) -> Array:
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def _convolved(x: Array, p: Mapping[str, Array], before: Array | None):
    y, inputs = oracles.causal_conv(
        x,
        p["conv"],
        p.get("conv_bias"),
        groups=x.shape[-1],
        initial_state=before,
    )
    return oracles.silu(y), inputs


def delta_net_row(
    params: Mapping[str, Array],
    x: Array,
    known: Settings,
    before: Remembered | None = None,
) -> tuple[Array, Remembered]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p, x = {name: wide(value) for name, value in params.items()}, wide(x)
    seq, heads = x.shape[0], known.n_heads
    inputs, state = (None, None) if before is None else before
    mixed = np.concatenate([x @ p[name].T for name in "qkv"], axis=-1)
    if "conv" in p:
        mixed, inputs = _convolved(mixed, p, inputs)
    else:
        mixed, inputs = oracles.silu(mixed), np.zeros((0, mixed.shape[-1]))
    width = p["q"].shape[0]
    q, k, v = (
        part.reshape(seq, heads, -1)
        for part in np.split(mixed, [width, 2 * width], axis=-1)
    )
    log_decay = None
    if "dt" in p:
        dt = oracles.softplus(x @ p["dt"].T + p["dt_bias"])
        log_decay = -dt * np.exp(p["A_log"])
    o, state = delta_rule(
        _of_length_one(q),
        _of_length_one(k),
        v,
        known.most * _sigmoid(x @ p["beta"].T),
        log_decay=log_decay,
        initial_state=state,
    )
    o = oracles.rms_norm(o, p["norm"], known.norm_eps).reshape(seq, -1)
    if "gate" in p:
        o = o * oracles.silu(x @ p["gate"].T)
    return o @ p["o"].T, Remembered(inputs, state)


def meta_linear_row(
    params: Mapping[str, Array],
    x: Array,
    known: Settings,
    before: Remembered | None = None,
) -> tuple[Array, Remembered]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p, x = {name: wide(value) for name, value in params.items()}, wide(x)
    seq, heads = x.shape[0], known.n_heads
    inputs, state = (None, None) if before is None else before
    mixed, inputs = _convolved(x, p, inputs)
    q, decay, v = (
        (mixed @ p[name].T).reshape(seq, heads, -1) for name in ("q", "decay", "v")
    )
    alpha = _sigmoid(decay) ** (1 / known.temperature)
    o, state = linear_attention(q, 1 - alpha, v, np.log(alpha), initial_state=state)
    itself = np.sum(q * p["augmentation"] * (1 - alpha), axis=-1, keepdims=True)
    o = oracles.layer_norm(o + _sigmoid(itself * v), eps=known.norm_eps)
    gate = oracles.silu(mixed @ p["gate"].T + p["gate_bias"])
    return (gate * o.reshape(seq, -1)) @ p["o"].T, Remembered(inputs, state)


def packed(row: Callable[..., Any], params, x, known, segment_ids) -> Array:
    """The documents of one row one by one; padding gives zero."""
    y = np.zeros(x.shape)
    for positions in oracles.documents(segment_ids):
        y[positions] = row(params, x[positions], known)[0]
    return y
