"""MesaNet as NumPy loops: at every token a weighted ridge regression on the prefix."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from support import numpy_oracles as oracles
from support.numpy_oracles import Array, documents, rms_norm, wide

from capibara_eqx.layers import MesaNet


FIELDS = {
    "q_proj.weight": lambda layer: layer.q_proj.weight,
    "k_proj.weight": lambda layer: layer.k_proj.weight,
    "v_proj.weight": lambda layer: layer.v_proj.weight,
    "conv.weight": lambda layer: layer.conv.weight,
    "decay_proj.weight": lambda layer: layer.decay_proj.weight,
    "decay_proj.bias": lambda layer: layer.decay_proj.bias,
    "beta_proj.weight": lambda layer: layer.beta_proj.weight,
    "beta_proj.bias": lambda layer: layer.beta_proj.bias,
    "ridge": lambda layer: layer.ridge,
    "norm.weight": lambda layer: layer.norm.weight,
    "gate_proj.weight": lambda layer: layer.gate_proj and layer.gate_proj.weight,
    "o_proj.weight": lambda layer: layer.o_proj.weight,
}


class Settings(NamedTuple):
    """What the arrays do not tell."""

    ridge_min: float
    norm_eps: float


class Sums(NamedTuple):
    """The convolution's last inputs, and H and G of the tokens before."""

    inputs: Array
    H: Array
    G: Array


def settings(layer: MesaNet) -> Settings:
    return Settings(layer.ridge_min, layer.norm.eps)


def parameters(layer: MesaNet) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy arrays."""
    found = {name: field(layer) for name, field in FIELDS.items()}
    return {name: np.asarray(v) for name, v in found.items() if v is not None}


def with_parameters(layer: MesaNet, values: Mapping) -> MesaNet:
    """The layer with other values, which may be traced, in place of its own."""
    for name, value in values.items():
        if name in FIELDS:
            layer = eqx.tree_at(FIELDS[name], layer, jnp.asarray(value))
    return layer


def ridge_map(
    k: Array, v: Array, weights: Array, ridge: Array, H: Array, G: Array
) -> Array:
    """The map that minimises the errors of all pairs and a ridge, plus older sums.

    The normal equations of the whole prefix, whose weights are given one by one.
    """
    left, right = H + np.diag(ridge), G
    for k_s, v_s, w_s in zip(k, v, weights, strict=True):
        left = left + w_s * np.outer(k_s, k_s)
        right = right + w_s * np.outer(v_s, k_s)
    return np.linalg.solve(left, right.T).T


def regressed(q, k, v, gamma, beta, ridge, H, G) -> tuple[Array, Array, Array]:
    """What the maps of all prefixes of one head say; H and G after the last token."""
    o = np.zeros_like(v)
    for t in range(len(q)):
        # What is left of each token, and of what came before all.
        left = np.array([np.prod(gamma[s + 1 : t + 1]) for s in range(t + 1)])
        weights, old = beta[: t + 1] * left, np.prod(gamma[: t + 1])
        seen = (k[: t + 1], v[: t + 1], weights, ridge)
        o[t] = ridge_map(*seen, old * H, old * G) @ q[t]
    H = old * H + (k * weights[:, None]).T @ k
    G = old * G + (v * weights[:, None]).T @ k
    return o, H, G


def mesa_row(
    params: Mapping[str, Array],
    x: Array,
    known: Settings,
    before: Sums | None = None,
) -> tuple[Array, Sums]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p = {name: wide(value) for name, value in params.items()}
    x, (n_heads, d) = wide(x), p["ridge"].shape
    channels, _, taps = p["conv.weight"].shape
    if before is None:
        zeros = np.zeros((n_heads, d, d))
        before = Sums(np.zeros((taps - 1, channels)), zeros, zeros)
    qk = np.concatenate([x @ p["q_proj.weight"].T, x @ p["k_proj.weight"].T], axis=-1)
    qk, inputs = oracles.causal_conv(
        qk, p["conv.weight"], groups=channels, initial_state=before.inputs
    )
    qk = oracles.silu(qk).reshape(len(x), 2, n_heads, d)
    qk = qk / np.sqrt(np.sum(qk * qk, axis=-1, keepdims=True) + 1e-6)
    v = (x @ p["v_proj.weight"].T).reshape(len(x), n_heads, d)
    gamma, beta = (
        1 / (1 + np.exp(-(x @ p[f"{n}_proj.weight"].T + p[f"{n}_proj.bias"])))
        for n in ("decay", "beta")
    )
    ridge = known.ridge_min + oracles.softplus(p["ridge"])
    heads = [
        regressed(
            *(qk[:, 0, h], qk[:, 1, h], v[:, h], gamma[:, h], beta[:, h]),
            *(ridge[h], before.H[h], before.G[h]),
        )
        for h in range(n_heads)
    ]
    o, H, G = (np.stack(part) for part in zip(*heads, strict=True))
    y = rms_norm(np.swapaxes(o, 0, 1), p["norm.weight"], known.norm_eps)
    y = y.reshape(x.shape)
    if "gate_proj.weight" in p:
        y = y * oracles.silu(x @ p["gate_proj.weight"].T)
    return y @ p["o_proj.weight"].T, Sums(inputs, H, G)


def mesa_packed(
    params: Mapping[str, Array], x: Array, known: Settings, segment_ids: Array
) -> Array:
    """The documents of one row one by one; padding gives zero."""
    y = np.zeros(x.shape)
    for positions in documents(segment_ids):
        y[positions] = mesa_row(params, x[positions], known)[0]
    return y
