"""TTT-Linear as NumPy loops: every token's weights as matrices, token by token."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from support.numpy_oracles import Array, documents, layer_norm, wide

from capibara_eqx.layers import TTTLinear


FIELDS = {
    "q_proj.weight": lambda layer: layer.q_proj.weight,
    "k_proj.weight": lambda layer: layer.k_proj.weight,
    "v_proj.weight": lambda layer: layer.v_proj.weight,
    "rate_proj.weight": lambda layer: layer.rate_proj.weight,
    "rate_proj.bias": lambda layer: layer.rate_proj.bias,
    "place_rate": lambda layer: layer.place_rate,
    "W0": lambda layer: layer.W0,
    "b0": lambda layer: layer.b0,
    "inner_weight": lambda layer: layer.inner_weight,
    "inner_bias": lambda layer: layer.inner_bias,
    "norm.weight": lambda layer: layer.norm and layer.norm.weight,
    "norm.bias": lambda layer: layer.norm and layer.norm.bias,
    "gate_proj.weight": lambda layer: layer.gate_proj and layer.gate_proj.weight,
    "o_proj.weight": lambda layer: layer.o_proj.weight,
}


class Settings(NamedTuple):
    """What the arrays do not tell."""

    inner_rate: float
    qk_norm: bool
    norm_eps: float


class Learned(NamedTuple):
    """Weights `(head, out, in)` and biases, what their gradients add up to, a count."""

    W: Array
    b: Array
    dW: Array
    db: Array
    count: int


def settings(layer: TTTLinear) -> Settings:
    return Settings(layer.inner_rate, layer.qk_norm, layer.norm_eps)


def parameters(layer: TTTLinear) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy arrays."""
    found = {name: field(layer) for name, field in FIELDS.items()}
    return {name: np.asarray(v) for name, v in found.items() if v is not None}


def with_parameters(layer: TTTLinear, values: Mapping) -> TTTLinear:
    """The layer with other values, which may be traced, in place of its own."""
    for name, value in values.items():
        if name in FIELDS:
            layer = eqx.tree_at(FIELDS[name], layer, jnp.asarray(value))
    return layer


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def unit(x: Array) -> Array:
    return x / np.sqrt(np.sum(x * x) + 1e-6)


def norm_and_jacobian(z: Array, weight: Array, bias: Array, eps: float):
    """A layer norm of a vector, and the matrix of its derivatives."""
    d, centred = len(z), z - np.mean(z)
    size = np.sqrt(np.mean(centred**2) + eps)
    projection = np.eye(d) - np.ones((d, d)) / d
    matrix = projection / size - np.outer(centred, centred) / (d * size**3)
    return weight * centred / size + bias, weight[:, None] * matrix


def fresh(params: Mapping[str, Array]) -> Learned:
    W, b = wide(params["W0"]), wide(params["b0"])
    return Learned(W, b, np.zeros_like(W), np.zeros_like(b), 0)


def ttt_row(
    params: Mapping[str, Array],
    x: Array,
    known: Settings,
    before: Learned | None = None,
) -> tuple[Array, Learned]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p = {name: wide(value) for name, value in params.items()}
    x, (n_heads, d) = wide(x), p["b0"].shape
    size = len(p["place_rate"])
    factors = np.maximum(1 / np.arange(1, size + 1) + p["place_rate"], 0)
    W, b, dW, db, count = fresh(p) if before is None else before
    W, b, dW, db = W.copy(), b.copy(), dW.copy(), db.copy()
    y = np.zeros((len(x), n_heads, d))
    for t, token in enumerate(x):
        q, k, v = (
            (p[f"{name}_proj.weight"] @ token).reshape(n_heads, d) for name in "qkv"
        )
        rates = p["rate_proj.weight"] @ token + p["rate_proj.bias"]
        rates = known.inner_rate / d / (1 + np.exp(-rates))
        for h in range(n_heads):
            q_h, k_h = (unit(q[h]), unit(k[h])) if known.qk_norm else (q[h], k[h])
            how = (p["inner_weight"][h], p["inner_bias"][h], known.norm_eps)
            normed, jacobian = norm_and_jacobian(W[h] @ k_h + b[h], *how)
            # Of |k + LN(W k + b) - v|^2.
            error = jacobian.T @ (2 * (k_h + normed - v[h]))
            dW[h] += rates[h] * np.outer(error, k_h)
            db[h] += rates[h] * error
            W_t, b_t = W[h] - factors[count] * dW[h], b[h] - factors[count] * db[h]
            y[t, h] = q_h + norm_and_jacobian(W_t @ q_h + b_t, *how)[0]
        count += 1
        if count == size:
            W, b = W - factors[-1] * dW, b - factors[-1] * db
            dW, db, count = np.zeros_like(dW), np.zeros_like(db), 0
    y = y.reshape(len(x), n_heads * d)
    if "norm.weight" in p:
        y = layer_norm(y, p["norm.weight"], p["norm.bias"], known.norm_eps)
    if "gate_proj.weight" in p:
        y = y * gelu(x @ p["gate_proj.weight"].T)
    return y @ p["o_proj.weight"].T, Learned(W, b, dW, db, count)


def ttt_packed(
    params: Mapping[str, Array], x: Array, known: Settings, segment_ids: Array
) -> Array:
    """The documents of one row one by one; padding gives zero."""
    y = np.zeros(x.shape)
    for positions in documents(segment_ids):
        y[positions] = ttt_row(params, x[positions], known)[0]
    return y


def as_state(weights: Array, bias: Array) -> Array:
    """How the layer's cache holds them: `(head, in + 1, out)`."""
    return np.concatenate([np.swapaxes(weights, -1, -2), bias[:, None]], axis=1)
