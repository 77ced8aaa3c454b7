"""The Mamba-2 layer with its caches as NumPy loops, and the way there from a layer."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from support import numpy_oracles as oracles
from support.mamba_oracle import ACTIVATIONS, Remembered
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import Mamba2


# Where the parameters of Hugging Face's names are in our layer.
FIELDS = {
    "in_proj.weight": lambda layer: layer.in_proj.weight,
    "in_proj.bias": lambda layer: layer.in_proj.bias,
    "conv1d.weight": lambda layer: layer.conv.weight,
    "conv1d.bias": lambda layer: layer.conv.bias,
    "dt_bias": lambda layer: layer.dt_bias,
    "A_log": lambda layer: layer.A_log,
    "D": lambda layer: layer.D,
    "norm.weight": lambda layer: layer.norm.weight,
    "out_proj.weight": lambda layer: layer.out_proj.weight,
    "out_proj.bias": lambda layer: layer.out_proj.bias,
}


class Settings(NamedTuple):
    """What the arrays do not tell."""

    n_groups: int
    norm_before_gate: bool
    norm_eps: float
    dt_limit: tuple[float, float]
    activation: str


def settings(layer: Mamba2) -> Settings:
    return Settings(
        layer.n_groups,
        layer.norm.norm_before_gate,
        layer.norm.eps,
        layer.dt_limit,
        layer.conv.activation or "",
    )


def parameters(layer: Mamba2) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy arrays."""
    found = {name: field(layer) for name, field in FIELDS.items()}
    return {name: np.asarray(v) for name, v in found.items() if v is not None}


def with_parameters(layer: Mamba2, values: Mapping) -> Mamba2:
    """The layer with other values, which may be traced, in place of its own."""
    for name, value in values.items():
        if name in FIELDS:
            layer = eqx.tree_at(FIELDS[name], layer, jnp.asarray(value))
    return layer


def _gated_norm(x: Array, z: Array, weight: Array, known: Settings) -> Array:
    if not known.norm_before_gate:
        x = x * oracles.silu(z)
    parts = np.split(x, known.n_groups, axis=-1)
    normed = [oracles.rms_norm(part, eps=known.norm_eps) for part in parts]
    y = np.concatenate(normed, axis=-1) * weight
    return y * oracles.silu(z) if known.norm_before_gate else y


def mamba2_row(
    params: Mapping[str, Array],
    x: Array,
    known: Settings,
    before: Remembered | None = None,
) -> tuple[Array, Remembered]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p = {name: wide(value) for name, value in params.items()}
    n_heads, d_inner = p["A_log"].shape[0], p["out_proj.weight"].shape[-1]
    channels, reach = p["conv1d.weight"].shape[0], p["conv1d.weight"].shape[-1] - 1
    d_state = (channels - d_inner) // (2 * known.n_groups)
    seq, head_dim = x.shape[0], d_inner // n_heads
    if before is None:
        zeros = np.zeros((n_heads, head_dim, d_state))
        before = Remembered(np.zeros((reach, channels)), zeros)
    projected = wide(x) @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)
    z, mixed, dt = np.split(projected, [d_inner, d_inner + channels], axis=-1)
    mixed, inputs = oracles.causal_conv(
        mixed,
        p["conv1d.weight"],
        p.get("conv1d.bias"),
        groups=channels,
        initial_state=before.inputs,
    )
    mixed = ACTIVATIONS[known.activation](mixed)
    ends = [d_inner, d_inner + known.n_groups * d_state]
    u, B, C = np.split(mixed, ends, axis=-1)
    dt = np.clip(oracles.softplus(dt + p["dt_bias"]), *known.dt_limit)
    u = u.reshape(seq, n_heads, head_dim)
    y, state = oracles.ssd(
        u,
        dt * -np.exp(p["A_log"]),
        B.reshape(seq, known.n_groups, d_state),
        C.reshape(seq, known.n_groups, d_state),
        coefficient=dt,
        initial_state=before.state,
    )
    y = (y + p["D"][:, None] * u).reshape(seq, d_inner)
    y = _gated_norm(y, z, p["norm.weight"], known)
    y = y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)
    return y, Remembered(inputs, state)


def mamba2_packed(
    params: Mapping[str, Array], x: Array, known: Settings, segment_ids: Array
) -> Array:
    """The documents of one row one by one; padding gives zero."""
    y = np.zeros(x.shape)
    for positions in oracles.documents(segment_ids):
        y[positions] = mamba2_row(params, x[positions], known)[0]
    return y
