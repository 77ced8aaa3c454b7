import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..internal import accumulate
from ..layers import AbstractAux


def aux_losses(aux: PyTree) -> dict[str, Float[Array, ""]]:
    """The named losses in what a model's layers report, summed over layers.

    **Arguments:**

    - `aux`: `ModelOutput.aux`, a PyTree with `AbstractAux` nodes in it.

    **Returns:**

    Loss by name, empty if no layer has one.

    !!! example

        ```python
        output = model.forward(tokens)
        penalty = sum(aux_losses(output.aux).values())
        ```
    """
    nodes = jax.tree.leaves(aux, is_leaf=lambda node: isinstance(node, AbstractAux))
    total: dict[str, Float[Array, ""]] = {}
    for node in nodes:
        if isinstance(node, AbstractAux):
            for name, loss in node.losses().items():
                total[name] = total.get(name, jnp.zeros(())) + accumulate(loss)
    return total
