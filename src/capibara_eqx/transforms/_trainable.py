import equinox as eqx
import jax
from jaxtyping import PyTree

from ..arrays import AffineArray, TernaryArray, is_weight


def trainable_spec(model: PyTree) -> PyTree:
    """Which parts of a model learn: the filter for `equinox.partition`.

    Every floating point array but the steps of weights that are kept as codes. Codes
    themselves are whole numbers, of which there is no gradient.

    **Arguments:**

    - `model`: any PyTree.

    **Returns:**

    A PyTree of booleans, true for every array that learns.

    !!! example

        ```python
        learns, rest = eqx.partition(model, trainable_spec(model))
        grads = jax.grad(lambda p: loss(eqx.combine(p, rest)))(learns)
        ```
    """

    def learns(node):
        if isinstance(node, AffineArray | TernaryArray):
            return jax.tree.map(lambda _: False, node)
        if is_weight(node):
            return jax.tree.map(eqx.is_inexact_array, node)
        return eqx.is_inexact_array(node)

    return jax.tree.map(learns, model, is_leaf=is_weight)
