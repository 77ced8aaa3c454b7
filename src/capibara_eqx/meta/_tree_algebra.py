"""PyTrees of arrays as vectors. Sums are taken in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..internal import accumulate, promote_dtypes


def inner_product(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The sum of all numbers of `a` times their conjugates in `b`; its real part."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(jnp.real(accumulate(x) * jnp.conj(accumulate(y)))), a, b
    )
    return _total(jax.tree.leaves(products))


def half_squared_distance(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Half the sum of squared differences, whose gradient in `a` is `a - b`."""
    differences = jax.tree.map(lambda x, y: accumulate(x) - accumulate(y), a, b)
    return inner_product(differences, differences) / 2


def _total(terms: list[Float[Array, ""]]) -> Float[Array, ""]:
    kind = promote_dtypes(*[term.dtype for term in terms])
    return jnp.sum(jnp.stack([term.astype(kind) for term in terms]))
