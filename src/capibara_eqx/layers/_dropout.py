import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..arrays import LoRAArray
from ..internal import check_probability


class Dropout(eqx.Module):
    r"""Zeroes each element with probability $p$ and scales the rest by $1/(1-p)$.

    Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting*, JMLR 15, 2014. `equinox.nn.inference_mode` turns it off.

    !!! example

        ```python
        y = Dropout(0.1)(x, key=jax.random.key(0))
        ```
    """

    # Not static, so that `eqx.tree_at` and `inference_mode` can change them.
    p: float
    inference: bool

    def __init__(self, p: float = 0.5, inference: bool = False):
        """**Arguments:**

        - `p`: probability of zeroing an element.
        - `inference`: whether to do nothing.

        **Raises:**

        `ValueError` unless `p` lies between 0 and 1.
        """
        check_probability("p", p)
        self.p = p
        self.inference = inference

    @jax.named_scope("capibara_eqx.layers.Dropout")
    def __call__(
        self, x: Float[Array, "*shape"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*shape"]:
        """**Arguments:**

        - `x`: any shape.
        - `key`: for the mask; needed unless `inference` is set or `p` is 0.

        **Returns:**

        The same shape and dtype.

        **Raises:**

        `ValueError` if dropout is active and there is no `key`.
        """
        if not _is_active(self):
            return x
        if key is None:
            raise ValueError(
                "Dropout: `key` is needed while dropout is active. Pass `key=...`, or "
                "turn it off with `eqx.nn.inference_mode(model)`."
            )
        keep = 1 - self.p
        mask = jax.random.bernoulli(key, keep, x.shape)
        # p = 1 keeps nothing; dividing by zero there would turn zeros into NaN.
        scale = 1 / jnp.where(keep == 0, 1, keep)
        return jnp.where(mask, x * scale.astype(x.dtype), jnp.zeros_like(x))


def _is_active(dropout: Dropout | eqx.nn.Dropout | LoRAArray) -> bool:
    if isinstance(dropout, LoRAArray):
        return dropout.has_active_dropout
    never = isinstance(dropout.p, int | float) and dropout.p == 0
    return not (dropout.inference or never)


def has_active_dropout(model: PyTree) -> bool:
    """Whether a call of `model` would zero elements at random.

    Equinox's layers and the adapters of weights count too.
    """

    def is_dropout(node):
        return isinstance(node, Dropout | eqx.nn.Dropout | LoRAArray)

    leaves = jax.tree.leaves(model, is_leaf=is_dropout)
    return any(is_dropout(leaf) and _is_active(leaf) for leaf in leaves)
