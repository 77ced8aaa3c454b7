"""The Mamba layer with its caches as NumPy loops, and the way there from a layer."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr
from support import numpy_oracles as oracles
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import Mamba


# Where the parameters of Hugging Face's names are in our layer.
FIELDS = {
    "in_proj.weight": lambda layer: layer.in_proj.weight,
    "in_proj.bias": lambda layer: layer.in_proj.bias,
    "conv1d.weight": lambda layer: layer.conv.weight,
    "conv1d.bias": lambda layer: layer.conv.bias,
    "x_proj.weight": lambda layer: layer.x_proj.weight,
    "dt_proj.weight": lambda layer: layer.dt_proj.weight,
    "dt_proj.bias": lambda layer: layer.dt_proj.bias,
    "A_log": lambda layer: layer.A_log,
    "D": lambda layer: layer.D,
    "out_proj.weight": lambda layer: layer.out_proj.weight,
    "out_proj.bias": lambda layer: layer.out_proj.bias,
}


def exact_gelu(x: Array) -> Array:
    """x times the normal distribution function of x."""
    return x * ndtr(x)


ACTIVATIONS = {**oracles.ACTIVATIONS, "gelu": exact_gelu}


class Remembered(NamedTuple):
    """The last inputs of the convolution, oldest first, and the state."""

    inputs: Array
    state: Array


def parameters(layer: Mamba) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy arrays."""
    found = {name: field(layer) for name, field in FIELDS.items()}
    return {name: np.asarray(v) for name, v in found.items() if v is not None}


def with_parameters(layer: Mamba, values: Mapping) -> Mamba:
    """The layer with other values, which may be traced, in place of its own."""
    for name, value in values.items():
        if name in FIELDS:
            layer = eqx.tree_at(FIELDS[name], layer, jnp.asarray(value))
    return layer


def mamba_row(
    params: Mapping[str, Array],
    x: Array,
    before: Remembered | None = None,
    activation: str = "silu",
) -> tuple[Array, Remembered]:
    """One row `(seq, d_model)` of one document, continued from `before`."""
    p = {name: wide(value) for name, value in params.items()}
    d_inner, d_state = p["A_log"].shape
    rank, reach = p["dt_proj.weight"].shape[-1], p["conv1d.weight"].shape[-1] - 1
    if before is None:
        before = Remembered(np.zeros((reach, d_inner)), np.zeros((d_inner, d_state)))
    projected = wide(x) @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)
    u, z = projected[:, :d_inner], projected[:, d_inner:]
    u, inputs = oracles.causal_conv(
        u,
        p["conv1d.weight"],
        p.get("conv1d.bias"),
        groups=d_inner,
        initial_state=before.inputs,
    )
    u = ACTIVATIONS[activation](u)
    selected = u @ p["x_proj.weight"].T
    y, state = oracles.selective_scan(
        u,
        selected[:, :rank] @ p["dt_proj.weight"].T,
        -np.exp(p["A_log"]),
        selected[:, rank : rank + d_state],
        selected[:, rank + d_state :],
        p["D"],
        z=z,
        delta_bias=p["dt_proj.bias"],
        delta_softplus=True,
        initial_state=before.state,
    )
    y = y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)
    return y, Remembered(inputs, state)
