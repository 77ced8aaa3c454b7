"""Directional derivatives of any order by central differences in float64.

A derivative of order k along directions v_1 ... v_k is the four-point central stencil
applied once for each direction. With step h its error is

    truncation  h^4 / 30 * |f^(k + 4)|      rounding  1.5^k * u * |f| / h^k

where u is the rounding error of f itself. `h = eps^(1 / (4 + k))` balances the two when
the higher derivatives are about as large as f, so inputs should be of order one and
directions of length one. The truncation is not taken on trust: the stencil is
evaluated with h and with 2 h, whose errors differ by a factor of 16, and their distance
is part of the bound that comes back.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np


Point = Mapping[str, np.ndarray]

_EPS = 2.0**-52
# (offset in steps, weight): exact for polynomials up to degree four.
_STENCIL = ((-2.0, 1 / 12), (-1.0, -2 / 3), (1.0, 2 / 3), (2.0, -1 / 12))
# The loops round a few dozen times on the way to their result.
_FUNCTION_ROUNDING = 16 * _EPS


@dataclasses.dataclass(frozen=True)
class Difference:
    """A derivative, a bound on its error, and the largest value the function took."""

    value: float
    bound: float
    scale: float


def _moved(point: Point, direction: Point, distance: float) -> dict[str, np.ndarray]:
    moved = dict(point)
    for name, values in direction.items():
        moved[name] = point[name] + distance * values
    return moved


def _stencil(
    function: Callable[[Point], float],
    point: Point,
    directions: Sequence[Point],
    step: float,
) -> tuple[float, float]:
    """The derivative with this step, and the largest value of the function."""
    if not directions:
        value = float(function(point))
        return value, abs(value)
    total, largest = 0.0, 0.0
    for offset, weight in _STENCIL:
        moved = _moved(point, directions[0], offset * step)
        value, size = _stencil(function, moved, directions[1:], step)
        total += weight * value
        largest = max(largest, size)
    return total / step, largest


def directional_derivative(
    function: Callable[[Point], float], point: Point, *directions: Point
) -> Difference:
    """The mixed derivative of a scalar `function` at `point` along `directions`."""
    order = len(directions)
    step = _EPS ** (1 / (4 + order))
    value, largest = _stencil(function, point, directions, step)
    coarse, _ = _stencil(function, point, directions, 2 * step)
    rounding = 1.5**order * _FUNCTION_ROUNDING * largest / step**order
    return Difference(value, abs(value - coarse) + rounding, max(1.0, largest))


def random_direction(
    point: Point, names: Sequence[str], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A random direction of length one in the inputs `names`."""
    direction = {}
    for name in names:
        values = rng.standard_normal(point[name].shape)
        if np.iscomplexobj(point[name]):
            values = values + 1j * rng.standard_normal(point[name].shape)
        direction[name] = values
    length = np.sqrt(sum(np.sum(np.abs(values) ** 2) for values in direction.values()))
    return {name: values / length for name, values in direction.items()}
