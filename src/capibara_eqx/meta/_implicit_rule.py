"""Derivatives of the minimum of a function, by the implicit function theorem."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from ..internal import accumulate
from ._tree_algebra import half_squared_distance, inner_product


# Conjugate gradients need as many as there are clusters of eigenvalues.
MOST_STEPS = 1000


def proximal(
    function: Callable[[PyTree], Float[Array, ""]],
    start: PyTree[Array],
    strength: Float[Array, ""],
) -> Callable[[PyTree], Float[Array, ""]]:
    """`function(p) + strength / 2 |p - start|^2`."""

    def value(params):
        value = function(params)
        distance = half_squared_distance(params, start)
        distance = strength.astype(distance.dtype) * distance
        return value + distance.astype(value.dtype)

    return value


class Solver(NamedTuple):
    """Where conjugate gradients stop: after so many steps, if any, or so close."""

    steps: int | None
    tolerance: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_implicit_gradient(
    static: PyTree,
    solver: Solver,
    found: PyTree[Array],
    start: PyTree[Array],
    strength: Float[Array, ""],
    arrays: PyTree[Array],
) -> PyTree[Array]:
    """`found`, with the derivatives of `argmin_p f(p) + strength / 2 |p - start|^2`.

    `f` is the function that `arrays` and `static` combine to.
    """
    return found


def _forward(static, solver, found, start, strength, arrays):
    # By the rule itself, so that second derivatives know how it moves with the start.
    found = with_implicit_gradient(static, solver, found, start, strength, arrays)
    return found, (found, start, strength, arrays)


def _backward(static, solver, residuals, cotangent):
    found, start, strength, arrays = residuals
    floats, others = eqx.partition(arrays, eqx.is_inexact_array)

    def slope(params, start, strength, floats):
        """The gradient that is zero at the minimum."""
        function = eqx.combine(floats, others, static)
        return jax.grad(proximal(function, start, strength))(params)

    def product(vector):
        """(I + H / strength) times a vector, without a derivative in forward mode."""

        def along(params):
            return inner_product(slope(params, start, strength, floats), vector)

        return _over(jax.grad(along)(found), strength)

    solved = _solve(product, jax.tree.map(accumulate, cotangent), solver)
    adjoint = _over(solved, strength)

    def pairing(start, strength, floats):
        return -inner_product(slope(found, start, strength, floats), adjoint)

    grads = jax.grad(pairing, argnums=(0, 1, 2))(start, strength, floats)
    return None, *grads


with_implicit_gradient.defvjp(_forward, _backward)


def _solve(product, vector: PyTree, solver: Solver) -> PyTree:
    """The vector whose `product` is `vector`."""
    # Tolerances of the solver are absolute: here of a system of length one.
    size = jax.lax.stop_gradient(_norm(vector))
    size = jnp.where(size > 0, size, 1)
    right = _over(vector, size)
    structure = jax.eval_shape(lambda: right)
    operator = lx.FunctionLinearOperator(
        product, structure, lx.positive_semidefinite_tag
    )
    method = lx.CG(
        rtol=solver.tolerance,
        atol=solver.tolerance,
        norm=_norm,
        max_steps=MOST_STEPS if solver.steps is None else solver.steps,
    )
    # lineax counts in integers and compares with floats; strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        solution = lx.linear_solve(operator, right, method, throw=False)
    broken = ~jnp.isfinite(_norm(solution.value))
    if solver.steps is None:
        broken = broken | (solution.result != lx.RESULTS.successful)
    found = eqx.error_if(
        solution.value,
        broken,
        "implicit_adapt: conjugate gradients did not solve (I + H / strength) u = g, "
        "for the outer gradient. Is `strength` too small for the curvature of the "
        "loss, so that H + strength I is not positive definite? Is `cg_tolerance` "
        "below what the dtype can reach? Is g, the gradient of the query, finite? "
        "`cg_steps=5` takes what so many steps find.",
    )
    return jax.tree.map(lambda leaf: leaf * size.astype(leaf.dtype), found)


def _over(vector: PyTree, number: Float[Array, ""]) -> PyTree:
    def over(leaf):
        leaf = accumulate(leaf)
        return leaf / number.astype(leaf.dtype)

    return jax.tree.map(over, vector)


def _norm(vector: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(inner_product(vector, vector))
