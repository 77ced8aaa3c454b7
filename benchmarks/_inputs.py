"""Inputs with the ranges that they have in a Mamba layer, from fixed seeds."""

from typing import Any, NamedTuple

import numpy as np


class ScanInputs(NamedTuple):
    """What `selective_scan` takes, in its order, and a cotangent of its `y`."""

    arguments: tuple[np.ndarray, ...]
    dy: np.ndarray


def scan_inputs(batch: int, seq: int, d_inner: int, d_state: int) -> ScanInputs:
    """Step sizes in [0.001, 0.1] and A = -1, -2, ..., as a layer has them at first."""
    rng = np.random.default_rng(0)
    steps = np.exp(rng.uniform(np.log(0.001), np.log(0.1), (batch, seq, d_inner)))
    A = -np.broadcast_to(np.arange(1.0, d_state + 1), (d_inner, d_state))
    arguments = (
        rng.normal(size=(batch, seq, d_inner)),
        steps,
        A,
        rng.normal(size=(batch, seq, d_state)),
        rng.normal(size=(batch, seq, d_state)),
        rng.normal(size=(d_inner,)),
    )
    dy = rng.normal(size=(batch, seq, d_inner))
    return ScanInputs(tuple(_narrow(x) for x in arguments), _narrow(dy))


def token_inputs(batch: int, d_inner: int, d_state: int) -> dict[str, np.ndarray]:
    """One token and a state, by the names that `selective_scan` gives them."""
    rng = np.random.default_rng(7)
    channels, states = (batch, d_inner), (batch, d_state)
    arrays = {
        "u": rng.normal(size=channels),
        "delta": rng.normal(size=channels),
        "A": -np.broadcast_to(np.arange(1.0, d_state + 1), (d_inner, d_state)),
        "B": rng.normal(size=states),
        "C": rng.normal(size=states),
        "D": rng.normal(size=(d_inner,)),
        "z": rng.normal(size=channels),
        "delta_bias": rng.uniform(-7, -2, size=(d_inner,)),
        "initial_state": rng.normal(size=(*channels, d_state)),
    }
    return {name: _narrow(array) for name, array in arrays.items()}


def scan_spec(
    name: str, batch: int, seq: int, d_inner: int, d_state: int
) -> dict[str, Any]:
    """A shape of the scan as the records hold it."""
    sizes = {"batch": batch, "seq": seq, "d_inner": d_inner, "d_state": d_state}
    return {"name": name, **sizes}


def normal(seed: int, *shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Standard normal float32 arrays."""
    rng = np.random.default_rng(seed)
    return tuple(_narrow(rng.normal(size=shape)) for shape in shapes)


def _narrow(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)
