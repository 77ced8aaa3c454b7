"""Few compilations: outside `jit` every operation is compiled by itself."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def built(make: Callable[..., Any], *args: Any, key: jax.Array, **options: Any) -> Any:
    """`make(*args, **options, key=key)`, all of its random draws in one compilation."""
    return eqx.filter_jit(lambda key: make(*args, **options, key=key))(key)


def filled(
    make: Callable[..., Any], *args: Any, seed: int, size: float, **options: Any
) -> Any:
    """What `make` builds, with numbers from NumPy of this size: nothing is compiled.

    For tests that hold whatever the numbers are, those of norms and biases too.
    """
    shapes = eqx.filter_eval_shape(
        lambda key: make(*args, **options, key=key), jax.random.key(0)
    )
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        assert jnp.issubdtype(leaf.dtype, jnp.floating), leaf
        return jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)
