"""The LinearSSM layer through SciPy's discretisation and simulation, in float64."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from scipy.signal import cont2discrete, dlsim
from support import numpy_oracles as oracles
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import LinearSSM


FIELDS = {
    "conv.weight": lambda layer: layer.conv.weight,
    "conv.bias": lambda layer: layer.conv.bias,
    "A": lambda layer: layer.A,
    "B": lambda layer: layer.B,
    "C": lambda layer: layer.C,
    "D": lambda layer: layer.D,
    "log_dt": lambda layer: layer.log_dt,
    "residual.weight": lambda layer: layer.residual_proj.weight,
    "residual.bias": lambda layer: layer.residual_proj.bias,
}


class Remembered(NamedTuple):
    """The last inputs of the convolution, oldest first, and the state."""

    inputs: Array
    state: Array


def fields_of(layer: LinearSSM) -> dict:
    projected = layer.residual_proj is not None
    return {k: v for k, v in FIELDS.items() if projected or not k.startswith("resid")}


def parameters(layer: LinearSSM) -> dict[str, Array]:
    """The parameters that the layer has, by name, as NumPy float64 arrays."""
    found = {name: field(layer) for name, field in fields_of(layer).items()}
    return {name: wide(value) for name, value in found.items()}


def with_parameters(layer: LinearSSM, values: Mapping) -> LinearSSM:
    """The layer with other values, which may be traced, in place of its own."""
    for name, field in fields_of(layer).items():
        layer = eqx.tree_at(field, layer, jnp.asarray(values[name]))
    return layer


def _scipy(function: Any, *args: Any, **options: Any) -> tuple[Any, ...]:
    """Its types say less than what it returns."""
    return function(*args, **options)


def discretized(A: Array, B: Array, dt: float, method: str) -> tuple[Array, Array]:
    """SciPy's matrices of a system in steps of `dt`."""
    nothing = np.zeros((1, len(A))), np.zeros((1, B.shape[1]))
    A_bar, B_bar, *_ = (
        wide(m) for m in _scipy(cont2discrete, (A, B, *nothing), dt, method)
    )
    return A_bar, B_bar


def core(
    p: Mapping[str, Array], u: Array, state: Array, method: str
) -> tuple[Array, Array]:
    """The system from its input on. SciPy reads out before a step, we do after it."""
    dt = float(np.exp(p["log_dt"]))
    A, B = discretized(p["A"], p["B"], dt, method)
    system = (A, B, p["C"] @ A, p["C"] @ B + p["D"], dt)
    _, y, states = _scipy(dlsim, system, u, x0=state)
    return y, A @ states[-1] + B @ u[-1]


def linear_ssm_row(
    layer: LinearSSM, p: Mapping[str, Array], x: Array, before: Remembered
) -> tuple[Array, Remembered]:
    """One row of one document, continued from `before`, with parameters `p`."""
    x = wide(x)
    convolved, inputs = oracles.causal_conv(
        x,
        p["conv.weight"],
        p["conv.bias"],
        groups=layer.input_dim,
        initial_state=before.inputs,
    )
    method = layer.discretization
    y, state = core(p, oracles.silu(convolved), wide(before.state), method)
    if layer.residual_proj is not None:
        y = y + x @ p["residual.weight"].T + p["residual.bias"]
    elif layer.residual:
        y = y + x
    return y, Remembered(inputs, state)
