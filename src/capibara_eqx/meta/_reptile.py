from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, PyTree

from ._adapt import adapt
from ._selection import split
from ._tree_algebra import half_squared_distance


def reptile(
    loss: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
) -> Callable[..., Float[Array, ""]]:
    r"""Half the squared distance from where a task leads, which holds no derivative.

    $$L_\text{task}(\theta) = \tfrac12 |\theta - \bar\theta_K|^2, \qquad
    \nabla L_\text{task} = \theta - \bar\theta_K$$

    with the parameters $\bar\theta_K$ after `adapt` as constants: Reptile, Nichol et
    al., arXiv 1803.02999. A step of the outer loop walks a part of the way to them. No
    derivative is taken of the inner loop. With one step of `sgd(rate)` the gradient is
    `rate` times that of training on all tasks at once.

    **Arguments:**

    - `loss`, `optimizer`, `steps`, `where`: as for `adapt`.

    **Returns:**

    `task_loss(model, task, *, key=None)`, one number, for `meta_value_and_grad` and
    `make_meta_step`. It learns from `task.support` and looks at no query: leave out
    none of the examples. What `where` does not choose has a gradient of zero.

    **Raises:**

    When called, what `adapt` raises.

    !!! example

        ```python
        task_loss = reptile(loss, optimizer=sgd(0.1), steps=5)
        step = make_meta_step(optax.sgd(0.1), task_loss)
        state = init_meta_state(model, optax.sgd(0.1))
        state, distance = step(state, tasks)
        ```
    """

    def task_loss(model, task, *, key=None):
        params, _ = split("reptile", model, where)
        adapted = adapt(
            loss,
            _constant(model),
            task.support,
            optimizer=optimizer,
            steps=steps,
            where=where,
            first_order=True,
            key=key,
        )
        target, _ = split("reptile", _constant(adapted), where)
        return half_squared_distance(params, target)

    return task_loss


def _constant(model: PyTree) -> PyTree:
    arrays, rest = eqx.partition(model, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)
