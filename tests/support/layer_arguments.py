"""Whether every argument of a constructor counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def describe(layer):
    """Outputs on one input, as numbers; shapes and dtypes of all parameters."""
    width = layer.input_dim if hasattr(layer, "input_dim") else layer.d_model
    x = jnp.sin(jnp.arange(7.0 * width)).reshape(7, width)
    y = np.asarray(eqx.filter_jit(lambda layer, x: layer(x))(layer, x))
    arrays = jax.tree.leaves(eqx.filter(layer, eqx.is_array))
    return y, [(leaf.shape, leaf.dtype) for leaf in arrays]


def differ(description, other) -> bool:
    """Whether two layers that were described are not the same one."""
    (y, arrays), (other_y, other_arrays) = description, other
    return arrays != other_arrays or bool(np.any(np.abs(y - other_y) > 1e-6))
