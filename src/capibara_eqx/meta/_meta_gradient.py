from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..internal import check_flag
from ._inner_loop import check_loss
from ._selection import split


def meta_value_and_grad(
    loss: Callable[..., Any],
    tasks: PyTree,
    *,
    where: PyTree = eqx.is_inexact_array,
    has_aux: bool = False,
    key: PRNGKeyArray | None = None,
) -> Callable[[PyTree], tuple[Any, PyTree]]:
    r"""The mean of a loss over tasks and its gradient, as a function of the model.

    $$\Big(\frac{1}{T} \sum_{t=1}^{T} L(\theta, \tau_t),\
    \nabla_\theta \frac{1}{T} \sum_{t=1}^{T} L(\theta, \tau_t)\Big)$$

    Tasks are a batch axis (`jax.vmap`): tasks that lie on several devices along their
    leading axis are computed where they lie.

    **Arguments:**

    - `loss`: `loss(model, task, *, key=None)`, such as `maml(...)`.
    - `tasks`: a PyTree whose arrays have a leading axis of tasks, such as a `Task`.
    - `where`: the leaves of the model that are learned; see `adapt`.
    - `has_aux`: whether `loss` returns `(loss, aux)`; the result is then
        `((value, aux), gradients)` with an axis of tasks in `aux`.
    - `key`: split over the tasks.

    **Returns:**

    `function(model) -> (value, gradients)`, the gradients with `None` for what is not
    learned.

    **Raises:**

    `ValueError` for tasks that are none, no arrays or not equally many in all arrays;
    when called, for a `where` that chooses nothing or a `loss` that is not one real
    number.

    !!! example

        ```python
        task_loss = maml(loss, optimizer=sgd(0.01), steps=1)
        value, gradients = meta_value_and_grad(task_loss, tasks)(model)
        ```
    """
    check_flag("has_aux", has_aux)
    count = _count(tasks)
    keys = None if key is None else _keys(key, tasks, count)

    def mean_loss(params, rest):
        model = eqx.combine(params, rest)

        def one(task, key):
            found = loss(model, task) if key is None else loss(model, task, key=key)
            value, aux = _with_aux(found) if has_aux else (found, None)
            return check_loss("meta_value_and_grad", value), aux

        losses, aux = jax.vmap(one)(tasks, keys)
        value = jnp.mean(losses)
        return (value, aux) if has_aux else value

    def value_and_grad(model):
        params, rest = split("meta_value_and_grad", model, where)
        return jax.value_and_grad(mean_loss, has_aux=has_aux)(params, rest)

    return value_and_grad


def _keys(key: PRNGKeyArray, tasks: PyTree, count: int) -> Array:
    """A key for each task; where the task lies, if its type says so, as `vmap` asks."""
    keys = jax.random.split(key, count)
    for leaf in jax.tree.leaves(tasks):
        where = jax.typeof(leaf).sharding
        if where.spec[0] is not None:
            return jax.sharding.reshard(
                keys, NamedSharding(where.mesh, P(where.spec[0]))
            )
    return keys


def _with_aux(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            "meta_value_and_grad: `loss` must return (loss, aux) with has_aux=True, "
            f"got {type(found).__name__}."
        )
    return found


def _count(tasks: PyTree) -> int:
    leaves = {
        "tasks" + jtu.keystr(path): leaf
        for path, leaf in jtu.tree_leaves_with_path(tasks)
    }
    others = [name for name, leaf in leaves.items() if not hasattr(leaf, "shape")]
    if others:
        raise ValueError(
            "meta_value_and_grad: `tasks` must hold arrays and nothing else, "
            f"`{others[0]}` is of type {type(leaves[others[0]]).__name__}. What all "
            "tasks share belongs to the loss."
        )
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    if not shapes or any(0 in shape for shape in shapes.values()):
        raise ValueError(
            "meta_value_and_grad: `tasks` must hold arrays with at least one task and "
            f"example each, got {shapes or 'no array'}."
        )
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) > 1 or () in counts:
        raise ValueError(
            "meta_value_and_grad: all arrays of `tasks` must have one leading axis of "
            f"tasks, as long in each, got {shapes}. Stack single tasks, as in "
            "`jax.tree.map(lambda *parts: jnp.stack(parts), *list_of_tasks)`."
        )
    return counts.pop()[0]
