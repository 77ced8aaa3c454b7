r"""A MAML gradient through a layer, against finite differences of NumPy loops.

The gradient after one step, $(I - \alpha H) \nabla L(\theta')$ at $\theta' = \theta -
\alpha \nabla L(\theta)$, is put together of differences of the loops of first and of
second order: of nothing that the library differentiates.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from support.derivatives import as_arrays, inner, quick_jit
from support.finite_differences import directional_derivative, random_direction
from support.numpy_oracles import Array
from support.precision import enable_x64
from support.tolerances import DIFFERENCE_TOLERANCES

from capibara_eqx.meta import adapt, sgd


RATE = 0.1


def check_maml(
    layer: Callable[..., jax.Array],
    loops: Callable[..., Array],
    params: Mapping[str, Array],
    d_model: int,
) -> None:
    """One inner step in all parameters, and the query's slope along a direction.

    Reverse mode over reverse mode, and forward mode over the reverse mode of the step.
    """
    rng = np.random.default_rng(11)
    support = rng.standard_normal((2, 4, d_model))
    query = rng.standard_normal((2, 3, d_model))
    along = random_direction(params, list(params), rng)

    def loss(params, batch, *, key=None):
        del key
        return jnp.mean((layer(params, batch[0]) - batch[1]) ** 2)

    def after(params):
        adapted = adapt(
            loss, params, jnp.asarray(support), optimizer=sgd(RATE), steps=1
        )
        return loss(adapted, jnp.asarray(query))

    def support_loss(params):
        return float(np.mean((loops(params, support[0]) - support[1]) ** 2))

    def query_loss(params):
        return float(np.mean((loops(params, query[0]) - query[1]) ** 2))

    with enable_x64():
        start, direction = as_arrays(params), as_arrays(along)
        reverse = quick_jit(lambda p: inner(jax.grad(after)(p), direction))(start)
        forward = quick_jit(lambda p: jax.jvp(after, (p,), (direction,))[1])(start)

    step = _gradient(support_loss, params)
    adapted = {name: value - RATE * step[name] for name, value in params.items()}
    outer = _gradient(query_loss, adapted)
    curvature = directional_derivative(support_loss, params, along, outer)
    slopes = [np.sum(outer[name] * along[name]) for name in params]
    want = sum(slopes) - RATE * curvature.value
    allowed = DIFFERENCE_TOLERANCES[2]
    assert RATE * curvature.bound <= allowed
    assert abs(RATE * curvature.value) > 1e3 * allowed, "the curvature does not count"
    assert abs(float(reverse) - want) <= allowed, (reverse, want)
    assert abs(float(forward) - want) <= allowed, (forward, want)


def _gradient(function: Callable[..., float], params: Mapping[str, Array]):
    """Every derivative of a NumPy function, by differences."""
    gradient = {name: np.zeros_like(value) for name, value in params.items()}
    for name, values in params.items():
        for index in np.ndindex(values.shape):
            unit = np.zeros_like(values)
            unit[index] = 1.0
            found = directional_derivative(function, params, {name: unit})
            gradient[name][index] = found.value
    return gradient
