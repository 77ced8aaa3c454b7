"""What classifiers of a few examples share: embeddings, labels and their loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, PyTree

from ..internal import accumulate, check_size, split_or_none
from ..layers._id_range import ids_in_range
from ._inner_loop import check_batch
from ._task import Task, check_task


def check_labels(
    function: str,
    argument: str,
    labels: Integer[Array, "..."],
    num_classes: int,
    shape: tuple[int, ...],
) -> Int[Array, "..."]:
    """`labels` as int32, one for each example; `shape` is that of the examples.

    `ValueError` for another shape or a dtype that is not whole, and an error at run
    time, also inside of `jit`, unless all lie in [0, num_classes).
    """
    check_size("num_classes", num_classes)
    labels = jnp.asarray(labels)
    if labels.shape != shape:
        raise ValueError(
            f"{function}: `{argument}` must have one label for each example, shape "
            f"{shape}, got shape {labels.shape}. Classes are numbers, not one-hot rows."
        )
    hint = "Classes are numbered from 0 within a task; pass their number `num_classes`."
    return ids_in_range(function, argument, labels, num_classes, hint)


def embed(
    function: str,
    argument: str,
    encode: Callable[..., Any],
    model: PyTree,
    x: PyTree,
    key: PRNGKeyArray | None,
) -> Float[Array, "n d"]:
    """What `encode` makes of `x`; `ValueError` unless that is a vector an example."""
    check_batch(function, argument, x)
    found = encode(model, x) if key is None else encode(model, x, key=key)
    shape = getattr(found, "shape", None)
    kind = getattr(found, "dtype", type(found))
    if shape is None or len(shape) != 2 or not jnp.issubdtype(kind, jnp.floating):
        what = type(found).__name__ if shape is None else f"{kind} of shape {shape}"
        raise ValueError(
            f"{function}: `encode` must return one vector of real numbers for each "
            f"example, (examples, features), got {what}. Use `jax.vmap` for a model "
            "that takes one example, and flatten what it makes of it."
        )
    return found


def embed_task(
    function: str,
    encode: Callable[..., Any],
    model: PyTree,
    task: Task,
    num_classes: int,
    key: PRNGKeyArray | None,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Embeddings and checked labels of the support and of the query."""
    check_task(function, task)
    parts = []
    keys = split_or_none(key, 2)
    for name, part_key in zip(("support", "query"), keys, strict=True):
        batch = getattr(task, name)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"{function}: `{name}` must be a pair (x, labels), got "
                f"{type(batch).__name__}. Make the task as `Task(support=(x, labels), "
                "query=(x, labels))`."
            )
        x = embed(function, name, encode, model, batch[0], part_key)
        labels = check_labels(
            function, f"{name}[1]", batch[1], num_classes, x.shape[:1]
        )
        parts.append((x, labels))
    return parts[0], parts[1]


def cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, " n"]
) -> Float[Array, ""]:
    """The mean of minus the logarithm of the probability of the label."""
    logarithms = jax.nn.log_softmax(accumulate(logits), axis=-1)
    return -jnp.mean(jnp.take_along_axis(logarithms, labels[:, None], axis=-1))
