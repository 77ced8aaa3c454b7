from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ..internal import (
    accumulate,
    check_floating,
    check_last_axis,
    check_size,
    promote_dtypes,
)
from ._episode import check_labels, cross_entropy, embed_task
from ._inner_loop import check_batch


def prototypes(
    x: Float[Array, "*batch n d"],
    labels: Integer[Array, "*batch n"],
    num_classes: int,
) -> Float[Array, "*batch classes d"]:
    r"""The mean of the examples of each class.

    $$c_k = \frac{1}{|S_k|} \sum_{i \in S_k} x_i, \qquad S_k = \{i : y_i = k\}$$

    Snell et al., *Prototypical Networks for Few-shot Learning*, arXiv 1703.05175.

    **Arguments:**

    - `x`: embeddings, `(*batch, n, d)`.
    - `labels`: `(*batch, n)`, from 0 to `num_classes - 1`; every class has an example.
    - `num_classes`: of every task alike.

    **Returns:**

    `(*batch, num_classes, d)`.

    **Raises:**

    `ValueError` for shapes that do not fit or are empty. At run time for a label that
    is out of range, and for a class without an example, whose mean is nothing; the
    message names the class.

    !!! example

        ```python
        x, labels = jnp.ones((10, 64)), jnp.arange(10) % 5
        centres = prototypes(x, labels, 5)                      # (5, 64)
        ```
    """
    check_batch("prototypes", "x", x)
    check_floating("prototypes", "x", x)
    labels = check_labels("prototypes", "labels", labels, num_classes, x.shape[:-1])
    return _means(x, labels, num_classes)


def prototype_logits(
    x: Float[Array, "*batch q d"], centres: Float[Array, "*batch classes d"]
) -> Float[Array, "*batch q classes"]:
    r"""Minus the squared distances to the prototypes.

    $$\log p(k \mid x) = -|x - c_k|^2 + \text{const}$$

    Snell et al., arXiv 1703.05175.

    **Arguments:**

    - `x`: embeddings, `(*batch, q, d)`.
    - `centres`: `(*batch, num_classes, d)`, see `prototypes`.

    **Returns:**

    `(*batch, q, num_classes)`, in float32 or wider.

    **Raises:**

    `ValueError` for sizes that differ.

    !!! example

        ```python
        centres = prototypes(jnp.ones((10, 64)), jnp.arange(10) % 5, 5)
        logits = prototype_logits(jnp.ones((3, 64)), centres)   # (3, 5)
        ```
    """
    if x.ndim < 2 or centres.ndim != x.ndim or x.shape[:-2] != centres.shape[:-2]:
        raise ValueError(
            "prototype_logits: `x` and `centres` must be (*batch, q, d) and (*batch, "
            f"num_classes, d), got shapes {x.shape} and {centres.shape}. Use "
            "`jax.vmap` for what has other axes in front."
        )
    check_last_axis("prototype_logits", "x", x, centres.shape[-1])
    kind = promote_dtypes(jnp.float32, x.dtype, centres.dtype)
    difference = x.astype(kind)[..., :, None, :] - centres.astype(kind)[..., None, :, :]
    return -jnp.sum(difference * difference, axis=-1)


def protonet(
    encode: Callable[..., Any], *, num_classes: int
) -> Callable[..., Float[Array, ""]]:
    r"""The loss of a task when each class is the mean of its embedded examples.

    $$L_\text{task}(\theta) = -\frac1{|Q|} \sum_{(x, y) \in Q} \log
    \mathrm{softmax}_k\big(-|f_\theta(x) - c_k|^2\big)_y$$

    with the prototypes $c_k$ of $f_\theta(S)$: Snell et al., arXiv 1703.05175.

    **Arguments:**

    - `encode`: `encode(model, x, *, key=None)`, an embedding for each example, `(n,
        d)`. It is called with a key only if there is one.
    - `num_classes`: of every task.

    **Returns:**

    `task_loss(model, task, *, key=None)`, one number, for `meta_value_and_grad` and
    `make_meta_step`, where `task.support` and `task.query` are `(x, labels)`.

    **Raises:**

    When called, what `prototypes` raises, also for the query, and `ValueError` for
    an `encode` that does not return one vector for each example.

    !!! example

        ```python
        task_loss = protonet(lambda model, x: jax.vmap(model)(x), num_classes=5)
        step = make_meta_step(optax.adam(1e-3), task_loss)
        ```
    """
    check_size("num_classes", num_classes)

    def task_loss(model, task, *, key=None):
        support, query = embed_task("protonet", encode, model, task, num_classes, key)
        centres = _means(*support, num_classes)
        return cross_entropy(prototype_logits(query[0], centres), query[1])

    return task_loss


def _means(x: Array, labels: Array, num_classes: int) -> Array:
    members = jax.nn.one_hot(labels, num_classes, axis=-2, dtype=jnp.bool_)
    members = _occupied(members, num_classes)
    wide = accumulate(x)
    counts = jnp.sum(members, axis=-1, keepdims=True, dtype=wide.dtype)
    sums = jnp.einsum("...kn,...nd->...kd", members.astype(wide.dtype), wide)
    return (sums / counts).astype(x.dtype)


def _occupied(members: Array, num_classes: int) -> Array:
    """`members`, `(..., classes, n)`; an error at run time if a class has none."""
    empty = ~jnp.any(members, axis=-1)
    somewhere = jnp.any(empty.reshape(-1, num_classes), axis=0)
    messages = [
        f"prototypes: every class must have an example in `labels`, class {number} of "
        f"{num_classes} has none. Is `num_classes` larger than that of the task?"
        for number in range(num_classes)
    ]
    return eqx.branched_error_if(
        members, jnp.any(somewhere), jnp.argmax(somewhere).astype(jnp.int32), messages
    )
