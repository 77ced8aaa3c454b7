from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, Float, PyTree

from ..internal import split_or_none
from ._implicit_adapt import implicit_adapt
from ._inner_loop import call_loss, check_batch
from ._task import check_task


def imaml(
    loss: Callable[..., Any],
    *,
    strength: int | float | Float[Array, ""],
    optimizer: optax.GradientTransformation,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
    cg_steps: int | None = None,
    cg_tolerance: float | None = None,
) -> Callable[..., Float[Array, ""]]:
    r"""The loss of a task after adapting to it near the start, with implicit gradients.

    $$\nabla L_\text{task}(\theta) = \Big(I + \tfrac1\lambda \nabla^2 L(\phi^*, S)
    \Big)^{-1} \nabla L(\phi^*, Q)$$

    iMAML, Rajeswaran et al., arXiv 1909.04630: that of `maml` with `implicit_adapt` in
    the place of `adapt`, so that memory does not grow with the inner steps.

    **Arguments:**

    - As for `implicit_adapt`.

    **Returns:**

    `task_loss(model, task, *, key=None)`, one number, for `meta_value_and_grad` and
    `make_meta_step`; `task` is a `Task`.

    **Raises:**

    When called, what `implicit_adapt` raises, and `ValueError` for an empty query.

    !!! example

        ```python
        task_loss = imaml(loss, strength=1.0, optimizer=sgd(0.1), steps=20, cg_steps=5)
        value, gradients = meta_value_and_grad(task_loss, tasks)(model)
        ```
    """

    def task_loss(model, task, *, key=None):
        check_task("imaml", task)
        check_batch("imaml", "query", task.query)
        inner_key, query_key = split_or_none(key, 2)
        adapted = implicit_adapt(
            loss,
            model,
            task.support,
            strength=strength,
            optimizer=optimizer,
            steps=steps,
            where=where,
            cg_steps=cg_steps,
            cg_tolerance=cg_tolerance,
            key=inner_key,
        )
        return call_loss("imaml", loss, adapted, task.query, query_key)

    return task_loss
