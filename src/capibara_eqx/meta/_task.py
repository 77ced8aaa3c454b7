from typing import Any

import equinox as eqx
from jaxtyping import PyTree


class Task(eqx.Module):
    """What to learn from and what to be judged by; many at once on a leading axis.

    - `support`: what the inner loop sees, whatever the loss takes, such as `(x, y)`.
    - `query`: what the adapted model is judged by.

    !!! example

        ```python
        task = Task(support=(x[:5], y[:5]), query=(x[5:], y[5:]))
        ```
    """

    support: PyTree
    query: PyTree


def check_task(function: str, task: Any) -> None:
    """Raise `ValueError` unless `task` has a support set and a query."""
    if not (hasattr(task, "support") and hasattr(task, "query")):
        raise ValueError(
            f"{function}: the task must be a Task, got {type(task).__name__}. Make it "
            "as `meta.Task(support, query)`."
        )
