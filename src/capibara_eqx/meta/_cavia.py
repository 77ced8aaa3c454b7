from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..internal import check_floating, check_size
from ._maml import maml
from ._selection import only


class WithContext(eqx.Module):
    r"""A model that reads a context, the same for all examples, beside its input.

    $$y = f([x, \phi])$$

    Zintgraf et al., *Fast Context Adaptation via Meta-Learning*, arXiv 1810.03642.

    - `model`: takes inputs of `d_in + d_context` features.
    - `context`: $\phi$, `(d_context,)`; zeros until it adapts.

    !!! example

        ```python
        network = layers.MLP(1 + 5, 40, d_out=1, key=key)
        learner = WithContext.init(network, 5)
        y = learner(jnp.ones((10, 1)))                          # (10, 1)
        ```
    """

    model: PyTree
    context: Float[Array, " d_context"]

    @classmethod
    def init(cls, model: PyTree, d_context: int) -> "WithContext":
        """A context of zeros; `model` must be made for as many more inputs."""
        check_size("d_context", d_context)
        return cls(model, jnp.zeros(d_context))

    def __call__(
        self, x: Float[Array, "*batch d_in"], *, key: PRNGKeyArray | None = None
    ) -> PyTree:
        """**Arguments:**

        - `x`: `(*batch, d_in)`, if `model` takes batches.
        - `key`: for `model`, which is called with a key only if there is one.

        **Returns:**

        What `model` makes of `(*batch, d_in + d_context)`.
        """
        check_floating("WithContext", "x", x)
        size = self.context.shape[-1]
        context = jnp.broadcast_to(self.context.astype(x.dtype), (*x.shape[:-1], size))
        x = jnp.concatenate([x, context], axis=-1)
        return self.model(x) if key is None else self.model(x, key=key)


def cavia(
    loss: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool = False,
    remat: str | None = None,
) -> Callable[..., Float[Array, ""]]:
    r"""The loss of a task after adapting a context to it, and nothing else.

    $$L_\text{task}(\theta) = L(\theta, \phi_K, Q), \qquad \phi_{k+1} = \phi_k - \alpha
    \nabla_\phi L(\theta, \phi_k, S), \quad \phi_0 = 0$$

    CAVIA, Zintgraf et al., arXiv 1810.03642. The network is learned by the outer loop
    alone. The context starts from zero in every task, so its outer gradient is zero.
    The paper clips outer gradients to $\pm 10$: `optax.chain(optax.clip(10), ...)`.

    **Arguments:**

    - `loss`, `optimizer`, `steps`, `first_order`, `remat`: as for `adapt`.

    **Returns:**

    `task_loss(learner, task, *, key=None)` with `learner` a `WithContext`, or a module
    of your own whose `context` is an array, or several in a PyTree.

    **Raises:**

    When called, what `maml` raises, and `ValueError` for a learner without `context`.

    !!! example

        ```python
        learner = WithContext.init(network, 5)
        task_loss = cavia(loss, optimizer=sgd(1.0), steps=1)
        value, gradients = meta_value_and_grad(task_loss, tasks)(learner)
        ```
    """

    def task_loss(learner, task, *, key=None):
        learner = _from_zero(learner)
        inner = maml(
            loss,
            optimizer=optimizer,
            steps=steps,
            where=only(learner, _context),
            first_order=first_order,
            remat=remat,
        )
        return inner(learner, task, key=key)

    return task_loss


def _context(learner: PyTree) -> PyTree:
    return learner.context


def _from_zero(learner: PyTree) -> PyTree:
    if not hasattr(learner, "context"):
        raise ValueError(
            "cavia: the learner must have a `context`, the array that adapts, got "
            f"{type(learner).__name__}. Make it with `meta.WithContext.init(model, 5)`."
        )
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else leaf,
        learner.context,
    )
    return eqx.tree_at(_context, learner, zeros)
