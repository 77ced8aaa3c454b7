"""The Mamba-3 layer with its caches as a NumPy loop, and the way there from a layer."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from support import numpy_oracles as oracles
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import Mamba3


FIELDS = {
    "in_proj.weight": lambda layer: layer.in_proj.weight,
    "dt_bias": lambda layer: layer.dt_bias,
    "B_norm.weight": lambda layer: layer.B_norm.weight,
    "C_norm.weight": lambda layer: layer.C_norm.weight,
    "B_bias": lambda layer: layer.B_bias,
    "C_bias": lambda layer: layer.C_bias,
    "D": lambda layer: layer.D,
    "norm.weight": lambda layer: layer.norm and layer.norm.weight,
    "out_proj.weight": lambda layer: layer.out_proj.weight,
}


class Settings(NamedTuple):
    """What the arrays do not tell."""

    n_groups: int
    A_floor: float
    norm_eps: float


class Remembered(NamedTuple):
    """The state, the angles turned so far, and the last token's B and u, of each head.

    B is that of the formula with the bar: normed, with its bias, and turned.
    """

    state: Array
    angle: Array
    B: Array
    u: Array


def settings(layer: Mamba3) -> Settings:
    return Settings(layer.n_groups, layer.A_floor, layer.B_norm.eps)


def parameters(layer: Mamba3) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy arrays."""
    found = {name: field(layer) for name, field in FIELDS.items()}
    return {name: np.asarray(v) for name, v in found.items() if v is not None}


def with_parameters(layer: Mamba3, values: Mapping) -> Mamba3:
    """The layer with other values, which may be traced, in place of its own."""
    for name, value in values.items():
        if name in FIELDS:
            layer = eqx.tree_at(FIELDS[name], layer, jnp.asarray(value))
    return layer


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def turned(values: Array, angle: Array) -> Array:
    """Neighbouring pairs of the first entries turned, one after the other."""
    out = values.copy()
    for pair, phi in enumerate(angle):
        first, second = values[2 * pair], values[2 * pair + 1]
        out[2 * pair] = np.cos(phi) * first - np.sin(phi) * second
        out[2 * pair + 1] = np.sin(phi) * first + np.cos(phi) * second
    return out


def mamba3_row(
    params: Mapping[str, Array],
    x: Array,
    known: Settings,
    before: Remembered | None = None,
) -> tuple[Array, Remembered]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p = {name: wide(value) for name, value in params.items()}
    (n_heads, d_state), d_inner = p["B_bias"].shape, p["out_proj.weight"].shape[-1]
    maps, head_dim = known.n_groups * d_state, d_inner // n_heads
    sizes = [d_inner, d_inner, maps, maps, n_heads, n_heads, n_heads]
    angles = p["in_proj.weight"].shape[0] - sum(sizes)
    if before is None:
        before = Remembered(
            np.zeros((n_heads, head_dim, d_state)),
            np.zeros((n_heads, angles)),
            np.zeros((n_heads, d_state)),
            np.zeros((n_heads, head_dim)),
        )
    state, angle, last_B, last_u = (value.copy() for value in before)
    y = np.zeros((x.shape[0], d_inner))
    for t, token in enumerate(wide(x)):
        parts = np.split(p["in_proj.weight"] @ token, np.cumsum(sizes))
        z, u, B, C, delta, alpha, mu, theta = parts
        B, C = (values.reshape(known.n_groups, d_state) for values in (B, C))
        B = oracles.rms_norm(B, p["B_norm.weight"], known.norm_eps)
        C = oracles.rms_norm(C, p["C_norm.weight"], known.norm_eps)
        for head in range(n_heads):
            group = head // (n_heads // known.n_groups)
            part = slice(head * head_dim, (head + 1) * head_dim)
            dt = oracles.softplus(delta[head] + p["dt_bias"][head])
            A = -max(oracles.softplus(alpha[head]), known.A_floor)
            decay, weight = np.exp(dt * A), sigmoid(mu[head])
            angle[head] += np.pi * dt * np.tanh(theta)
            B_here = turned(B[group] + p["B_bias"][head], angle[head])
            C_here = turned(C[group] + p["C_bias"][head], angle[head])
            state[head] = (
                decay * state[head]
                + (1 - weight) * dt * decay * np.outer(last_u[head], last_B[head])
                + weight * dt * np.outer(u[part], B_here)
            )
            last_B[head], last_u[head] = B_here, u[part]
            read = state[head] @ C_here + p["D"][head] * u[part]
            if "norm.weight" in p:
                read = oracles.rms_norm(read, p["norm.weight"][part], known.norm_eps)
            y[t, part] = read * oracles.silu(z[part])
    return y @ p["out_proj.weight"].T, Remembered(state, angle, last_B, last_u)


def mamba3_packed(
    params: Mapping[str, Array], x: Array, known: Settings, segment_ids: Array
) -> Array:
    """The documents of one row one by one; padding gives zero."""
    y = np.zeros(x.shape)
    for positions in oracles.documents(segment_ids):
        y[positions] = mamba3_row(params, x[positions], known)[0]
    return y
