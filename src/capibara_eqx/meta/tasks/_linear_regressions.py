import jax
from jaxtyping import PRNGKeyArray

from ...internal import check_size
from .._task import Task


def sample_linear_regressions(
    key: PRNGKeyArray, num_tasks: int, *, d_in: int, shots: int, queries: int
) -> Task:
    r"""Linear regression without noise, whose weights are the task.

    $$y = w^\top x, \qquad w \sim N(0, I), \quad x \sim N(0, I)$$

    What gradient descent from zero reaches is known: after one step of rate $\alpha$ on
    the mean of $\tfrac12 (y - w^\top x)^2$ over $N$ shots the best rate is
    $N / (N + d + 1)$, and leaves $\mathbb{E}\,|w - w_1|^2 = d (d + 1) / (N + d + 1)$.

    **Arguments:**

    - `key`: everything follows from it.
    - `num_tasks`: length of the leading axis.
    - `d_in`: $d$, the number of inputs.
    - `shots`: $N$, examples to learn from.
    - `queries`: examples to be judged by.

    **Returns:**

    A `Task` of pairs `(x, y)`: `(num_tasks, shots, d_in)` and `(num_tasks, shots, 1)`
    to learn from, as many with `queries` to be judged by.

    **Raises:**

    `ValueError` for a size that is not positive.

    !!! example

        ```python
        tasks = sample_linear_regressions(key, 100, d_in=5, shots=10, queries=10)
        ```
    """
    sizes = {
        "num_tasks": num_tasks,
        "d_in": d_in,
        "shots": shots,
        "queries": queries,
    }
    for name, size in sizes.items():
        check_size(name, size)
    weight_key, support_key, query_key = jax.random.split(key, 3)
    weights = jax.random.normal(weight_key, (num_tasks, d_in, 1))

    def examples(key, count):
        x = jax.random.normal(key, (num_tasks, count, d_in))
        return x, x @ weights

    return Task(examples(support_key, shots), examples(query_key, queries))
