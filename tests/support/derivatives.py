"""Checks of the derivatives of a JAX function against a NumPy loop.

The JAX `function` and the NumPy `oracle` both take a dictionary of arrays and return
one real number. What the library differentiates is compared with finite differences of
the oracle, never with finite differences of itself. Everything runs in float64.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

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


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` with little optimisation of machine code: it compiles in half the time.

    Derivatives are large programs that these tests run once, on a handful of numbers.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


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


def _slope(gradient: Arrays, point: Point, direction: Point) -> float:
    """`inner` in NumPy: outside `jit` every product and sum is compiled by itself."""
    return sum(
        float(np.sum(np.real(np.asarray(gradient[name]) * direction[name])))
        for name in point
        if name in direction
    )


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


def _assert_slopes(
    gradient: Arrays, oracle: Oracle, point: Point, rng: np.random.Generator
) -> None:
    """Every input's gradient along a random direction, against the oracle."""
    for name in point:
        direction = random_direction(point, [name], rng)
        want = directional_derivative(oracle, point, direction)
        got = _slope(gradient, point, direction)
        _assert_difference(got, want, 1, f"grad of {name}")


def _assert_curvatures(
    product: Arrays,
    along: Point,
    oracle: Oracle,
    point: Point,
    rng: np.random.Generator,
) -> None:
    """The Hessian times `along`, in every input, against the oracle."""
    for name in point:
        direction = random_direction(point, [name], rng)
        want = directional_derivative(oracle, point, along, direction)
        got = _slope(product, point, direction)
        _assert_difference(got, want, 2, f"second derivative in {name}")


def check_gradient(
    function: Function,
    oracle: Oracle,
    point: Point,
    place: Callable[[Point], dict[str, Array]] = as_arrays,
    seed: int = 0,
) -> None:
    """Reverse mode, in every input; `place` puts the point on its devices."""
    with enable_x64(True):
        value, gradient = quick_jit(jax.value_and_grad(function))(place(point))
        assert_close(value, oracle(point), dtype=np.float64, length=100, name="value")
        _assert_slopes(gradient, oracle, point, np.random.default_rng(seed))


def check_first_order(
    function: Function, oracle: Oracle, point: Point, seed: int = 0
) -> None:
    """Reverse and forward mode, in every input."""
    check_gradient(function, oracle, point, seed=seed)
    rng = np.random.default_rng(seed)
    with enable_x64(True):
        forward = quick_jit(lambda p, v: jax.jvp(function, (p,), (v,))[1])
        for name in point:
            direction = random_direction(point, [name], rng)
            want = directional_derivative(oracle, point, direction)
            got = forward(as_arrays(point), _full_direction(point, direction))
            _assert_difference(got, want, 1, f"jvp along {name}")


def check_second_order(
    function: Function, oracle: Oracle, point: Point, seed: int = 0
) -> None:
    """The Hessian in every input, both modes over reverse, against the oracle."""
    rng = np.random.default_rng(seed)
    common = random_direction(point, list(point), rng)
    with enable_x64(True):
        arrays, along = as_arrays(point), _full_direction(point, common)
        mixed = quick_jit(hessian_product(function, along))(arrays)
        reverse = quick_jit(jax.grad(gradient_along(function, along)))(arrays)
        for name in point:
            assert_close(
                reverse[name], mixed[name], dtype=np.float64, length=1000, name=name
            )
        _assert_curvatures(mixed, common, oracle, point, rng)


def check_third_order(
    function: Function, oracle: Oracle, point: Point, seed: int = 0
) -> None:
    """One third derivative by reverse over reverse over reverse."""
    rng = np.random.default_rng(seed)
    directions = [random_direction(point, list(point), rng) for _ in range(3)]
    want = directional_derivative(oracle, point, *directions)
    with enable_x64(True):
        nested = function
        for direction in directions:
            nested = gradient_along(nested, _full_direction(point, direction))
        got = quick_jit(nested)(as_arrays(point))
        _assert_difference(got, want, 3, "third order")


def check_vmap_of_derivatives(
    function: Function, oracle: Oracle, points: list[Point], seed: int = 0
) -> None:
    """`vmap` of grad, of jvp and of the Hessian product, over several points."""
    rng = np.random.default_rng(seed)
    common = random_direction(points[0], list(points[0]), rng)
    with enable_x64(True):
        along = _full_direction(points[0], common)

        def derivatives(arrays: Arrays) -> tuple[Arrays, Array, Arrays]:
            tangent = jax.jvp(function, (arrays,), (along,))[1]
            product = hessian_product(function, along)(arrays)
            return jax.grad(function)(arrays), tangent, product

        stacked = {name: np.stack([row[name] for row in points]) for name in points[0]}
        together = quick_jit(jax.vmap(derivatives))(as_arrays(stacked))
        together = jax.tree.map(np.asarray, together)
        for index, point in enumerate(points):
            row = jax.tree.map(operator.itemgetter(index), together)
            gradient, tangent, product = row
            _assert_slopes(gradient, oracle, point, rng)
            want = directional_derivative(oracle, point, common)
            _assert_difference(tangent, want, 1, "jvp")
            _assert_curvatures(product, common, oracle, point, rng)
