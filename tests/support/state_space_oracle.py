"""S4D and S4 as NumPy loops in complex128, and what their tests share.

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

from capibara_eqx.layers import weight_decay_mask


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


def s4_step(params: Mapping[str, Array]) -> Step:
    """Steps of the dense matrices, of both states of each conjugate pair."""
    half = -np.exp(wide(params[".log_A_real"])) + 1j * wide(params[".A_imag"])
    poles = np.concatenate([half, np.conj(half)], axis=-1)
    P, B = from_pairs(params[".P"]), from_pairs(params[".B"])
    P, B = np.concatenate([P, P.conj()], 1), np.concatenate([B, B.conj()], 1)
    eye = np.eye(poles.shape[-1])
    A = poles[:, None] * eye - P @ np.conj(np.swapaxes(P, 1, 2))
    dt = np.exp(wide(params[".log_dt"]))[:, None, None]

    def step(h, u):
        both = np.concatenate([h, np.conj(h)], axis=-1)[..., None]
        right = (eye + dt / 2 * A) @ both + dt * B[..., None] * u[:, None, None]
        return np.linalg.solve(eye - dt / 2 * A, right)[:, : h.shape[-1], 0]

    return step


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


def moved(layer: Any, seed: int) -> Any:
    """The layer with noise on every parameter."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(noisy, layer)


def kernel_of(layer: Any, length: int) -> Array:
    return np.asarray(eqx.filter_jit(lambda layer: layer.kernel(length))(layer))


def parameters_that_decay(layer: Any) -> set[str]:
    leaves = jax.tree.leaves_with_path(weight_decay_mask(layer))
    return {jax.tree_util.keystr(path) for path, leaf in leaves if leaf}


def point_of(layer: Any, seed: int, seq: int, state: bool = True) -> dict[str, Array]:
    """Parameters, input and state of order one, as float64 arrays."""
    rng = np.random.default_rng(seed)
    point = {name: wide(value) for name, value in parameters(layer).items()}
    point["x"] = rng.standard_normal((seq, layer.d_model))
    if state:
        point["state"] = rng.standard_normal((layer.d_model, layer.d_state))
    return point


def read(layer: Any, point: Mapping[str, Any]) -> tuple[Any, Any]:
    """The outputs, and the last state where there is a first one."""
    layer = with_parameters(layer, point)
    if "state" not in point:
        return layer(point["x"]), jnp.zeros_like(point["x"], shape=(0,))
    cache = eqx.tree_at(lambda c: c.state, layer.init_cache(), point["state"])
    y, cache = layer.prefill(point["x"], cache)
    return y, cache.state


def losses_of(
    layer: Any, seq: int, step_of: Callable[[Mapping[str, Array]], Step]
) -> tuple[Callable, Callable]:
    """One loss of outputs and state twice: on the layer, and on the loops."""
    rng = np.random.default_rng(7)
    shape = (layer.d_model, layer.d_state)
    weights = rng.standard_normal((seq, layer.d_model)), rng.standard_normal(shape)

    def loss(point):
        y, state = read(layer, point)
        weight = weights[1] if state.size else np.zeros(0)
        return jnp.sum(weights[0] * y**2) + jnp.sum(weight * state**2)

    def oracle(point):
        state = point.get("state", np.zeros(shape))
        y, state = state_space_row(point, step_of(point), point["x"], state)
        end = np.sum(weights[1] * state**2) if "state" in point else 0.0
        return float(np.sum(weights[0] * y**2) + end)

    return loss, oracle
