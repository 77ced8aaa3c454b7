"""The S5 layer as one real system with a full matrix, through SciPy, in float64."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from scipy.signal import dlsim
from scipy.special import expit
from support.linear_ssm_oracle import discretized
from support.mamba_oracle import exact_gelu
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import S5


FIELDS = {
    "eigenvalues": lambda layer: layer.eigenvalues,
    "B": lambda layer: layer.B,
    "C": lambda layer: layer.C,
    "D": lambda layer: layer.D,
    "log_step": lambda layer: layer.log_step,
    "gate.weight": lambda layer: layer.gate.weight,
    "gate.bias": lambda layer: layer.gate.bias,
}


def parameters(layer: S5) -> dict[str, Array]:
    """The parameters, by name, as NumPy float64 arrays."""
    return {name: wide(field(layer)) for name, field in FIELDS.items()}


def with_parameters(layer: S5, values: Mapping) -> S5:
    """The layer with other values, which may be traced, in place of its own."""
    for name, field in FIELDS.items():
        layer = eqx.tree_at(field, layer, jnp.asarray(values[name]))
    return layer


def real_system(p: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """A, B and C of the state (real parts, imaginary parts), each state's time scaled
    by its own step, so that all have the step 1."""
    step = np.exp(p["log_step"])
    real, imag = (np.diag(step * part) for part in p["eigenvalues"].T)
    A = np.block([[real, -imag], [imag, real]])
    B = np.concatenate([step[:, None] * p["B"][..., k] for k in (0, 1)])
    C = np.concatenate([2 * p["C"][..., 0], -2 * p["C"][..., 1]], axis=-1)
    return A, B, C


def s5_row(
    layer: S5, p: Mapping[str, Array], x: Array, state: Array
) -> tuple[Array, Array]:
    """One row of one document, continued from a state `(half, 2)`."""
    x, state = wide(x), wide(state)
    if layer.clip_eigenvalues:
        pairs = p["eigenvalues"].copy()
        pairs[:, 0] = np.minimum(pairs[:, 0], -1e-4)
        p = {**p, "eigenvalues": pairs}
    A, B, C = real_system(p)
    A, B = discretized(A, B, 1.0, layer.discretization)
    # SciPy reads out before a step, we do after it.
    system = (A, B, C @ A, C @ B + np.diag(p["D"]), 1.0)
    simulate: Any = dlsim
    _, y, states = simulate(system, x, x0=state.T.ravel())
    after = A @ states[-1] + B @ x[-1]
    g = exact_gelu(y)
    return g * expit(g @ p["gate.weight"].T + p["gate.bias"]), after.reshape(2, -1).T
