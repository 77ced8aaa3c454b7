import math

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ...internal import check_flag, check_size
from .._task import Task


# Inputs lie between this and its negative.
_MOST = 5.0


def sample_sinusoids(
    key: PRNGKeyArray, num_tasks: int, *, shots: int, queries: int, grid: bool = False
) -> Task:
    r"""Regression on a sine whose amplitude and phase are the task.

    $$y = A \sin(x - \varphi), \qquad A \sim U(0.1, 5), \quad \varphi \sim U(0, \pi),
    \quad x \sim U(-5, 5)$$

    Finn et al., *Model-Agnostic Meta-Learning*, arXiv 1703.03400, section 5.1.

    **Arguments:**

    - `key`: everything follows from it.
    - `num_tasks`: length of the leading axis.
    - `shots`: examples to learn from.
    - `queries`: examples to be judged by.
    - `grid`: whether the inputs of the queries are spread evenly from -5 to 5, the
        same for all tasks, instead of drawn.

    **Returns:**

    A `Task` of pairs `(x, y)`: `(num_tasks, shots, 1)` twice to learn from and
    `(num_tasks, queries, 1)` twice to be judged by.

    **Raises:**

    `ValueError` for a size that is not positive.

    !!! example

        ```python
        tasks = sample_sinusoids(key, 25, shots=10, queries=10)
        x, y = tasks.support                                     # (25, 10, 1) each
        ```
    """
    check_size("num_tasks", num_tasks)
    check_size("shots", shots)
    check_size("queries", queries)
    check_flag("grid", grid)
    # One draw for all: what compiles is a generator of random bits for each.
    drawn = shots if grid else shots + queries
    uniform = jax.random.uniform(key, (num_tasks, 2 + drawn, 1))
    amplitude = 0.1 + 4.9 * uniform[:, :1]
    phase = math.pi * uniform[:, 1:2]
    x = _MOST * (2 * uniform[:, 2:] - 1)
    support, query = x[:, :shots], x[:, shots:]
    if grid:
        points = jnp.linspace(-_MOST, _MOST, queries, dtype=x.dtype)
        query = jnp.broadcast_to(points[:, None], (num_tasks, queries, 1))

    def labelled(x):
        return x, amplitude * jnp.sin(x - phase)

    return Task(labelled(support), labelled(query))
