from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PyTree

from ..internal import (
    check_floating,
    check_last_axis,
    check_range,
    check_size,
    promote_dtypes,
)
from ._episode import check_labels, cross_entropy, embed_task
from ._inner_loop import check_batch
from ._ridge_head import ridge_head


class WithRidge(eqx.Module):
    r"""A model and the three numbers of a ridge classifier on top that are learned.

    $$\mathrm{logits} = \alpha X' W + \beta, \qquad W = \mathrm{ridge\_head}(X, Y)$$

    Bertinetto et al., arXiv 1805.08136. Ridge regression to one-hot labels gives values
    near 0 and 1, which are no logits: hence the scale $\alpha$. The bias $\beta$ is the
    paper's; one number for all classes leaves a softmax as it is.

    - `model`: makes the embeddings.
    - `log_lambda`: $\ln \lambda$ of `ridge_head`.
    - `scale`, `bias`: $\alpha$ and $\beta$.

    !!! example

        ```python
        learner = WithRidge.init(model, strength=1.0, scale=10.0)
        x, labels = jnp.ones((5, 64)), jnp.arange(5)
        logits = learner.classify(x, labels, jnp.ones((3, 64)), num_classes=5)
        ```
    """

    model: PyTree
    log_lambda: Float[Array, ""]
    scale: Float[Array, ""]
    bias: Float[Array, ""]

    @classmethod
    def init(
        cls, model: PyTree, *, strength: float = 1.0, scale: float = 1.0
    ) -> "WithRidge":
        r"""$\lambda$ = `strength`, positive, $\alpha$ = `scale` and $\beta = 0$."""
        check_range("strength", strength, above=0)
        check_range("scale", scale, above=0)
        return cls(
            model,
            jnp.log(jnp.asarray(strength, float)),
            jnp.asarray(scale, float),
            jnp.zeros(()),
        )

    def classify(
        self,
        support: Float[Array, "*batch n d"],
        labels: Integer[Array, "*batch n"],
        query: Float[Array, "*batch q d"],
        *,
        num_classes: int,
    ) -> Float[Array, "*batch q classes"]:
        """**Arguments:**

        - `support`: embeddings of the examples, `(*batch, n, d)`.
        - `labels`: `(*batch, n)`, from 0 to `num_classes - 1`.
        - `query`: embeddings to classify, `(*batch, q, d)`.
        - `num_classes`: of every task.

        **Returns:**

        Logits, `(*batch, q, num_classes)`, in float32 or wider.

        **Raises:**

        `ValueError` for shapes that do not fit or are empty. At run time for a label
        that is out of range, and what `ridge_head` raises.
        """
        for name, array in (("support", support), ("query", query)):
            check_batch("WithRidge", name, array)
            check_floating("WithRidge", name, array)
        check_last_axis("WithRidge", "query", query, support.shape[-1])
        if query.shape[:-2] != support.shape[:-2] or query.ndim < 2:
            raise ValueError(
                "WithRidge: `query` must be (*batch, q, d) with the axes in front that "
                f"`support` has, {support.shape}; got shape {query.shape}."
            )
        labels = check_labels(
            "WithRidge", "labels", labels, num_classes, support.shape[:-1]
        )
        return _classify(self, support, labels, query, num_classes)


def r2d2(
    encode: Callable[..., Any], *, num_classes: int
) -> Callable[..., Float[Array, ""]]:
    r"""The loss of a task when ridge regression on embeddings tells its classes apart.

    $$L_\text{task} = -\frac1{|Q|} \sum_{(x, y) \in Q} \log
    \mathrm{softmax}(\alpha f_\theta(x) W + \beta)_y, \qquad
    W = \mathrm{ridge\_head}(f_\theta(S), Y)$$

    R2-D2, Bertinetto et al., arXiv 1805.08136: an inner loop in closed form, through
    which the embedding, $\lambda$, $\alpha$ and $\beta$ are learned.

    **Arguments:**

    - `encode`: `encode(model, x, *, key=None)`, an embedding for each example, `(n,
        d)`. It is called with a key only if there is one.
    - `num_classes`: of every task.

    **Returns:**

    `task_loss(learner, task, *, key=None)` with `learner` a `WithRidge`, one number,
    for `meta_value_and_grad` and `make_meta_step`; `task.support` and `task.query` are
    `(x, labels)`.

    **Raises:**

    When called, `ValueError` for an empty support or query, labels that are not one
    for each example, or an `encode` that does not return one vector for each example.
    At run time for a label that is out of range, and what `ridge_head` raises.

    !!! example

        ```python
        learner = WithRidge.init(model)
        task_loss = r2d2(lambda model, x: jax.vmap(model)(x), num_classes=5)
        value, gradients = meta_value_and_grad(task_loss, tasks)(learner)
        ```
    """
    check_size("num_classes", num_classes)

    def task_loss(learner, task, *, key=None):
        if not isinstance(learner, WithRidge):
            raise ValueError(
                "r2d2: the learner must be a WithRidge, a model with what its head "
                f"learns, got {type(learner).__name__}. Make it with "
                "`meta.WithRidge.init(model)`."
            )
        model = learner.model
        support, query = embed_task("r2d2", encode, model, task, num_classes, key)
        logits = _classify(learner, *support, query[0], num_classes)
        return cross_entropy(logits, query[1])

    return task_loss


def _classify(
    learner: WithRidge, support: Array, labels: Array, query: Array, num_classes: int
) -> Array:
    kind = promote_dtypes(
        jnp.float32, support.dtype, query.dtype, learner.log_lambda.dtype
    )
    rows = jax.nn.one_hot(labels, num_classes, dtype=kind)
    weights = ridge_head(support.astype(kind), rows, learner.log_lambda)
    found = query.astype(kind) @ weights
    return learner.scale.astype(kind) * found + learner.bias.astype(kind)
