"""S4D and S4 as NumPy loops in complex128, and the way there from a layer.

States are complex here, one of each conjugate pair; a cache holds their real parts,
then their imaginary parts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, ndtr
from support.numpy_oracles import Array, documents, wide


# A step of all channels: `h`, `u` to the next `h`.
Step = Callable[[Array, Array], Array]


class Discrete(NamedTuple):
    """Diagonal steps."""

    A: Array
    B: Array


def parameters(layer: Any) -> dict[str, Array]:
    """The parameters by path, as NumPy arrays."""
    leaves = jax.tree.leaves_with_path(eqx.filter(layer, eqx.is_inexact_array))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def with_parameters(layer: Any, values: Mapping[str, Any]) -> Any:
    """The layer with other values, which may be traced, in place of its own."""

    def replaced(path, leaf):
        value = values.get(jax.tree_util.keystr(path))
        return leaf if value is None else jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(replaced, layer)


def from_pairs(pairs: Array) -> Array:
    return wide(pairs)[..., 0] + 1j * wide(pairs)[..., 1]


def as_complex(state: Array) -> Array:
    half = state.shape[-1] // 2
    return wide(state)[..., :half] + 1j * wide(state)[..., half:]


def as_state(h: Array) -> Array:
    return np.concatenate([np.real(h), np.imag(h)], axis=-1)


def s4d_steps(params: Mapping[str, Array], discretization: str) -> Discrete:
    A = -np.exp(wide(params[".log_A_real"])) + 1j * wide(params[".A_imag"])
    dt = np.exp(wide(params[".log_dt"]))[:, None]
    if discretization == "zoh":
        return Discrete(np.exp(dt * A), (np.exp(dt * A) - 1) / A)
    return Discrete((2 + dt * A) / (2 - dt * A), 2 * dt / (2 - dt * A))


def s4d_step(params: Mapping[str, Array], discretization: str) -> Step:
    steps = s4d_steps(params, discretization)
    return lambda h, u: steps.A * h + steps.B * u[:, None]


def gated(params: Mapping[str, Array], s: Array) -> Array:
    """The output stage."""
    hidden = (s * ndtr(s)) @ wide(params[".output.proj.weight"]).T
    a, b = np.split(hidden + wide(params[".output.proj.bias"]), 2, axis=-1)
    return a * expit(b)


def state_space_row(
    params: Mapping[str, Array], step: Step, x: Array, state: Array
) -> tuple[Array, Array]:
    """One row `(seq, d_model)` of one document, continued from `state`."""
    C, D, x = from_pairs(params[".C"]), wide(params[".D"]), wide(x)
    h, outputs = as_complex(state), []
    for u in x:
        h = step(h, u)
        outputs.append(2 * np.sum(C * h, axis=-1).real + D * u)
    return gated(params, np.stack(outputs)), as_state(h)


def state_space_packed(
    params: Mapping[str, Array], step: Step, x: Array, ids: Array, d_state: int
) -> Array:
    """A row of documents and padding, each document by itself."""
    y = np.zeros(x.shape)
    for positions in documents(ids):
        zeros = np.zeros((x.shape[-1], d_state))
        y[positions] = state_space_row(params, step, x[positions], zeros)[0]
    return y
