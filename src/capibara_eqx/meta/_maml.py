from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..internal import check_range, check_size, split_or_none
from ._adapt import adapt, adapt_trajectory
from ._inner_loop import call_loss, check_batch
from ._selection import split
from ._task import check_task


def maml(
    loss: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    where: PyTree = eqx.is_inexact_array,
    first_order: bool = False,
    remat: str | None = None,
    step_weights: Float[Array, " steps"] | None = None,
) -> Callable[..., Float[Array, ""]]:
    r"""The loss of a task after adapting to it.

    $$L_\text{task}(\theta) = L(\theta_K, Q), \qquad
    \theta_K = \mathrm{adapt}(\theta, S)$$

    MAML, Finn et al., arXiv 1703.03400; with `first_order=True` its first-order form;
    with a `where` of the head alone ANIL, Raghu et al., arXiv 1909.09157. With
    `step_weights` it is the loss of MAML++, $\sum_k w_k L(\theta_k, Q)$, Antoniou et
    al., arXiv 1810.09502.

    **Arguments:**

    - `loss`, `optimizer`, `steps`, `where`, `first_order`, `remat`: as for `adapt`.
    - `step_weights`: of the losses after each step, `(steps,)`; that after the last
        alone if not given. See `multi_step_weights`.

    **Returns:**

    `task_loss(model, task, *, key=None)`, one number, for `meta_value_and_grad` and
    `make_meta_step`; `task` is a `Task`.

    **Raises:**

    When called, what `adapt` raises, and `ValueError` for an empty query or
    `step_weights` of another length.

    !!! example

        ```python
        task_loss = maml(loss, optimizer=sgd(0.01), steps=1)
        value, gradients = meta_value_and_grad(task_loss, tasks)(model)
        ```
    """
    how: dict[str, Any] = {
        "optimizer": optimizer,
        "steps": steps,
        "where": where,
        "first_order": first_order,
        "remat": remat,
    }

    def after_last(model, task, *, key=None):
        check_task("maml", task)
        check_batch("maml", "query", task.query)
        inner_key, query_key = split_or_none(key, 2)
        model = adapt(loss, model, task.support, key=inner_key, **how)
        return call_loss("maml", loss, model, task.query, query_key)

    if step_weights is None:
        return after_last
    weights = jnp.asarray(step_weights)

    def after_every(model, task, *, key=None):
        check_task("maml", task)
        check_batch("maml", "query", task.query)
        _check_weights(weights, steps)
        inner_key, query_key = split_or_none(key, 2)
        path = adapt_trajectory(loss, model, task.support, key=inner_key, **how)
        # `where` may ask for the shape of a leaf, which is that of the model.
        params, _ = split("maml", model, where)
        moves = jax.tree.map(eqx.is_array, params, is_leaf=lambda node: node is None)
        moved, fixed = eqx.partition(path, moves)

        def judge(params):
            model = eqx.combine(params, fixed)
            return call_loss("maml", loss, model, task.query, query_key)

        losses = jax.vmap(judge)(moved)
        return jnp.sum(weights.astype(losses.dtype) * losses)

    return after_every


def multi_step_weights(
    steps: int, progress: float | Float[Array, ""]
) -> Float[Array, " steps"]:
    r"""Weights of MAML++ for the losses after each step, which anneal to the last.

    $$w_k = \max\!\Big(\frac{1 - p}{K}, \frac{0.03}{K}\Big) \quad (k < K), \qquad
    w_K = 1 - \sum_{k < K} w_k$$

    Antoniou et al., *How to Train Your MAML*, arXiv 1810.09502; the floor is that of
    the authors' program.

    **Arguments:**

    - `steps`: $K$.
    - `progress`: $p$, the share of the annealing that is over, in [0, 1]; it may be an
        array inside of `jit`.

    **Returns:**

    `(steps,)`; they add up to 1.

    **Raises:**

    `ValueError` for `steps` that are not positive, or a number `progress` outside of
    [0, 1]; an array is clipped.

    !!! example

        ```python
        weights = multi_step_weights(5, jnp.minimum(1, epoch / 15))
        task_loss = maml(loss, optimizer=sgd(0.1), steps=5, step_weights=weights)
        ```
    """
    check_size("steps", steps)
    if not eqx.is_array(progress):
        check_range("progress", progress, least=0, most=1)
    progress = jnp.clip(jnp.asarray(progress, float), 0, 1)
    share = jnp.maximum(1 - progress, 0.03) / steps
    return jnp.full(steps, share).at[-1].set(1 - (steps - 1) * share)


def _check_weights(weights, steps) -> None:
    if steps == 0:
        raise ValueError(
            "maml: `step_weights` are of the losses after each step, and `steps` is 0. "
            "Leave them out, or take a step."
        )
    if weights.shape != (steps,):
        raise ValueError(
            f"maml: `step_weights` must have one weight for each of {steps} steps, got "
            f"shape {weights.shape}. Make them with `meta.multi_step_weights({steps}, "
            "progress)`."
        )
