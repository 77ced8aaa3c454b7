import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import optax
from jaxtyping import Array, Float, PyTree

from ._maml import maml
from ._sgd import rates_like, sgd


class WithRates(eqx.Module):
    """A model and the rates of its inner loop, which are learned together.

    !!! example

        ```python
        learner = WithRates.init(model, 0.1, per="element")
        ```
    """

    model: PyTree
    rates: PyTree[Float[Array, "..."]]

    @classmethod
    def init(
        cls,
        model: PyTree,
        rate: float,
        *,
        where: PyTree = eqx.is_inexact_array,
        per: str = "element",
        steps: int | None = None,
    ) -> "WithRates":
        """Equal rates for every parameter that adapts; see `rates_like`."""
        return cls(model, rates_like(model, rate, where=where, per=per, steps=steps))


def meta_sgd(
    loss: Callable[..., Any],
    *,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
    optimizer: Callable[..., optax.GradientTransformation] = sgd,
    per_step: bool = False,
    first_order: bool = False,
    remat: str | None = None,
    step_weights: Float[Array, " steps"] | None = None,
) -> Callable[..., Float[Array, ""]]:
    r"""The loss of a task after adapting to it with rates that are learned too.

    $$L_\text{task}(\theta, \alpha) = L(\theta - \alpha \odot \nabla L(\theta, S), Q)$$

    Meta-SGD, Li et al., arXiv 1707.09835, which has a rate for every parameter and one
    step. With rates a leaf and step it is the inner loop of MAML++, Antoniou et al.,
    arXiv 1810.09502.

    **Arguments:**

    - `loss`, `steps`, `where`, `first_order`, `remat`, `step_weights`: as for `maml`.
    - `optimizer`: makes the inner optimiser of rates: `sgd` or `safe_adam`.
    - `per_step`: whether the rates have a leading axis of steps.

    **Returns:**

    `task_loss(learner, task, *, key=None)` with `learner` a `WithRates`.

    **Raises:**

    `ValueError` for an `optimizer` that does not take rates. When called, what `maml`
    and `sgd` raise.

    !!! example

        ```python
        learner = WithRates.init(model, 0.1, per="leaf", steps=5)
        task_loss = meta_sgd(loss, steps=5, per_step=True)
        value, gradients = meta_value_and_grad(task_loss, tasks)(learner)
        ```
    """

    _check_factory(optimizer)

    def task_loss(learner, task, *, key=None):
        if not isinstance(learner, WithRates):
            raise ValueError(
                "meta_sgd: the learner must be a WithRates, a model with its rates, "
                f"got {type(learner).__name__}. Make it with `meta.WithRates.init("
                "model, 0.1)`."
            )
        inner = maml(
            loss,
            optimizer=optimizer(learner.rates, per_step=per_step),
            steps=steps,
            where=where,
            first_order=first_order,
            remat=remat,
            step_weights=step_weights,
        )
        return inner(learner.model, task, key=key)

    return task_loss


def _check_factory(optimizer: Any) -> None:
    fits = callable(optimizer) and any(
        parameter.name == "per_step" or parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(optimizer).parameters.values()
    )
    if not fits:
        what = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise ValueError(
            "meta_sgd: `optimizer` must be a function of the learned rates, "
            f"`optimizer(rates, per_step=...)`, got {what}. Pass `meta.sgd` or "
            "`meta.safe_adam` itself; an optimizer with rates of its own goes to "
            "`meta.maml`."
        )
