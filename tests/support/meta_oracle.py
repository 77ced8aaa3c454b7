"""Inner loops on quadratics in float64 NumPy, one step after the other.

The loss is `(p - c)' H (p - c) / 2` with a symmetric `H`, so that a step `p - a H (p -
c)` moves `d = p - c` to `(I - a H) d`, and an outer gradient `g` back to `(I - H a) g`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from support.numpy_oracles import Array


class Quadratic(NamedTuple):
    """Curvature `(size, size)` and centre `(size,)`."""

    curvature: Array
    centre: Array

    def value(self, p: Array) -> float:
        d = p - self.centre
        return float(d @ self.curvature @ d) / 2

    def slope(self, p: Array) -> Array:
        return self.curvature @ (p - self.centre)


def quadratic(size: int, seed: int) -> Quadratic:
    """A random one; its curvatures lie between 0 and about 3."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size)) / np.sqrt(size)
    return Quadratic(root @ root.T, rng.standard_normal(size))


def descend(inner: Quadratic, start: Array, rates: Sequence[Array | float]) -> Array:
    """The start and what comes after every step, `(steps + 1, size)`."""
    path = [np.asarray(start, "float64")]
    for rate in rates:
        path.append(path[-1] - rate * inner.slope(path[-1]))
    return np.stack(path)


def adapted_loss(
    inner: Quadratic,
    outer: Quadratic,
    start: Array,
    rates: Sequence[Array | float],
    weights: Sequence[float] | None = None,
    first_order: bool = False,
) -> tuple[float, Array, Array]:
    """The outer loss after the steps, and its gradients: at the start `(size,)`, and at
    the rate of every step and parameter `(steps, size)`.

    With `weights` the sum of the losses after every step, so weighted.
    """
    path = descend(inner, start, rates)
    count = len(rates)
    weights = [*[0.0] * (count - 1), 1.0] if weights is None else weights
    value = sum(w * outer.value(p) for w, p in zip(weights, path[1:], strict=True))
    back, to_rates = np.zeros_like(path[0]), []
    for k in reversed(range(count)):
        back = back + weights[k] * outer.slope(path[k + 1])
        to_rates.append(-back * inner.slope(path[k]))
        if not first_order:
            back = back - inner.curvature @ (rates[k] * back)
    return value, back, np.stack(to_rates[::-1])


def adam(
    inner: Quadratic, start: Array, rate: float, steps: int, eps_root: float
) -> Array:
    """Where Adam ends that adds `eps_root` inside of its root."""
    p, m, v = np.asarray(start, "float64"), 0.0, 0.0
    for t in range(1, steps + 1):
        gradient = inner.slope(p)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        size = np.sqrt(v / (1 - 0.999**t) + eps_root) + 1e-8
        p = p - rate * m / (1 - 0.9**t) / size
    return p
