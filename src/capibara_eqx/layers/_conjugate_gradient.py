from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


Product = Callable[[Array], Array]


def conjugate_gradient(
    product: Product, b: Float[Array, "*batch d"], steps: int
) -> Float[Array, "*batch d"]:
    r"""Solves $A x = b$ for every vector of `b`, each with a matrix of its own.

    `product` multiplies every vector by its matrix, which must be symmetric and
    positive definite. Hestenes and Stiefel, *Methods of Conjugate Gradients for Solving
    Linear Systems*, 1952, from zero and for a number of steps that does not depend on
    the values; `d` of them are exact but for rounding.

    Derivatives are those of the solution, $\dot x = A^{-1} (\dot b - \dot A x)$, solved
    for in the same way and not through the steps: nothing is kept of these, and they
    are the derivatives of what comes back only as far as it has converged.
    """

    def solve(product, b):
        start = (jnp.zeros_like(b), b, b, jnp.sum(b * b, axis=-1, keepdims=True))
        return jax.lax.fori_loop(0, steps, lambda _, c: _step(product, *c), start)[0]

    return jax.lax.custom_linear_solve(product, b, solve, symmetric=True)


def _step(product, x, residual, direction, size):
    """One step; what has converged to zero stays where it is."""
    image = product(direction)
    curvature = jnp.sum(direction * image, axis=-1, keepdims=True)
    length = _ratio(size, curvature)
    x = x + length * direction
    residual = residual - length * image
    new_size = jnp.sum(residual * residual, axis=-1, keepdims=True)
    direction = residual + _ratio(new_size, size) * direction
    return x, residual, direction, new_size


def _ratio(a, b):
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
