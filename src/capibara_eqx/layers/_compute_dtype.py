import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike, PyTree

from ._weight_decay import weight_decay_mask


def cast_for_compute(model: PyTree, dtype: DTypeLike) -> PyTree:
    """`model` with its matrices, kernels and embeddings in `dtype`.

    Biases, norms and whatever else weight decay leaves alone keep their dtype: they
    are small, and the decay rates of a state space need their digits. So do complex
    numbers, of which there are no narrow ones.

    **Arguments:**

    - `model`: any PyTree; layers of this library and of `equinox.nn` are known.
    - `dtype`: of the forward and backward pass, such as `jnp.bfloat16`.

    **Returns:**

    A model to compute with. Derivatives in `model` come back in its own dtypes.

    !!! example

        ```python
        layer = Mamba(64, key=key)
        y = cast_for_compute(layer, "bfloat16")(x.astype("bfloat16"))
        ```
    """

    def cast(leaf, is_matrix):
        narrows = is_matrix and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if narrows else leaf

    return jax.tree.map(cast, model, weight_decay_mask(model))
