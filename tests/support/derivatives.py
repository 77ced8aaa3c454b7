"""Checks of the derivatives of a JAX function against a NumPy loop.

The JAX `function` and the NumPy `oracle` both take a dictionary of arrays and return
one real number. What the library differentiates is compared with finite differences of
the oracle, never with finite differences of itself. Everything runs in float64.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from support.finite_differences import (
    Difference,
    Point,
    directional_derivative,
    random_direction,
)
from support.precision import enable_x64
from support.tolerances import DIFFERENCE_TOLERANCES, assert_close


Arrays = Mapping[str, Array]
Function = Callable[[Arrays], Array]
Oracle = Callable[[Point], float]


def as_arrays(point: Point) -> dict[str, Array]:
    return {name: jnp.asarray(values) for name, values in point.items()}


def _full_direction(point: Point, direction: Point) -> dict[str, Array]:
    """`direction` as JAX arrays, with zeros for the inputs that it leaves alone."""
    return {
        name: jnp.asarray(direction.get(name, np.zeros_like(values)))
        for name, values in point.items()
    }


def inner(gradient: Arrays, direction: Arrays) -> Array:
    """The derivative along `direction`; a complex gradient is d/dx - i d/dy in JAX."""
    terms = [jnp.sum(jnp.real(gradient[name] * direction[name])) for name in gradient]
    return sum(terms[1:], start=terms[0])


def gradient_along(function: Function, direction: Arrays) -> Function:
    """The first derivative along `direction`, by reverse mode, as a function."""
    return lambda arrays: inner(jax.grad(function)(arrays), direction)


def hessian_product(function: Function, direction: Arrays) -> Callable[[Arrays], dict]:
    """The Hessian times `direction`, forward over reverse."""

    def product(arrays: Arrays) -> dict[str, Array]:
        return jax.jvp(jax.grad(function), (arrays,), (direction,))[1]

    return product


def _assert_difference(got: object, want: Difference, order: int, name: str) -> None:
    allowed = DIFFERENCE_TOLERANCES[order] * want.scale
    assert want.bound <= allowed, (
        f"{name}: the finite difference itself is only good to {want.bound:.1e}, "
        f"but {allowed:.1e} is needed; choose smaller inputs"
    )
    error = abs(float(np.asarray(got)) - want.value)
    assert error <= allowed, (
        f"{name}: derivative {float(np.asarray(got)):.12g}, finite difference "
        f"{want.value:.12g}, off by {error:.2e}, allowed {allowed:.2e}"
    )


def check_first_order(function: Function, oracle: Oracle, point: Point, seed: int = 0):
    """Reverse and forward mode, in every input, against the oracle."""
    rng = np.random.default_rng(seed)
    with enable_x64(True):
        arrays = as_arrays(point)
        value, gradient = jax.jit(jax.value_and_grad(function))(arrays)
        forward = jax.jit(lambda p, v: jax.jvp(function, (p,), (v,))[1])
        assert_close(value, oracle(point), dtype=np.float64, length=100, name="value")
        for name in point:
            direction = random_direction(point, [name], rng)
            along = _full_direction(point, direction)
            want = directional_derivative(oracle, point, direction)
            _assert_difference(inner(gradient, along), want, 1, f"grad of {name}")
            _assert_difference(forward(arrays, along), want, 1, f"jvp along {name}")


def check_second_order(function: Function, oracle: Oracle, point: Point, seed: int = 0):
    """The Hessian in every input, both modes over reverse, against the oracle."""
    rng = np.random.default_rng(seed)
    common = random_direction(point, list(point), rng)
    with enable_x64(True):
        arrays, along = as_arrays(point), _full_direction(point, common)
        mixed = jax.jit(hessian_product(function, along))(arrays)
        reverse = jax.jit(jax.grad(gradient_along(function, along)))(arrays)
        for name in point:
            assert_close(
                reverse[name], mixed[name], dtype=np.float64, length=1000, name=name
            )
            direction = random_direction(point, [name], rng)
            want = directional_derivative(oracle, point, common, direction)
            got = inner(mixed, _full_direction(point, direction))
            _assert_difference(got, want, 2, f"second derivative in {name}")


def check_third_order(function: Function, oracle: Oracle, point: Point, seed: int = 0):
    """One third derivative by reverse over reverse over reverse, against the oracle."""
    rng = np.random.default_rng(seed)
    directions = [random_direction(point, list(point), rng) for _ in range(3)]
    want = directional_derivative(oracle, point, *directions)
    with enable_x64(True):
        nested = function
        for direction in directions:
            nested = gradient_along(nested, _full_direction(point, direction))
        _assert_difference(jax.jit(nested)(as_arrays(point)), want, 3, "third order")


def check_vmap_of_derivatives(function: Function, points: list[Point], seed: int = 0):
    """`vmap` of grad, jvp and Hessian product equals one point after the other."""
    rng = np.random.default_rng(seed)
    direction = random_direction(points[0], list(points[0]), rng)
    with enable_x64(True):
        along = _full_direction(points[0], direction)

        def derivatives(arrays: Arrays) -> dict[str, object]:
            return {
                "grad": jax.grad(function)(arrays),
                "jvp": jax.jvp(function, (arrays,), (along,))[1],
                "hessian product": hessian_product(function, along)(arrays),
            }

        stacked = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *map(as_arrays, points)
        )
        together = jax.jit(jax.vmap(derivatives))(stacked)
        alone = jax.jit(derivatives)
        for index, point in enumerate(points):
            want = jax.tree.leaves_with_path(alone(as_arrays(point)))
            got = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[index], together))  # noqa: B023
            for (path, expected), actual in zip(want, got, strict=True):
                assert_close(
                    actual,
                    expected,
                    dtype=np.float64,
                    length=1000,
                    name=jax.tree_util.keystr(path),
                )
