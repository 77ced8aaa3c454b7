import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from ..arrays import NM, FakeQuantArray, nm_mask
from ..internal import check_range
from ._places import get, places, replace


def sr_ste(weight_decay: float = 2e-4) -> optax.GradientTransformation:
    r"""Pulls the weights that an `NM` leaves out towards zero.

    $$g \leftarrow g + \lambda\,(1 - m) \odot W$$

    for every weight that `prepare_qat` prepared with an `NM`, $m$ being its mask of
    the moment, so that what is left out does not come back by chance. Zhou et al.,
    *Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch*, arXiv
    2102.04010. Put it in front of the optimiser.

    **Arguments:**

    - `weight_decay`: $\lambda$.

    **Returns:**

    An optax transformation, whose `update` needs the parameters.

    **Raises:**

    `ValueError` for a negative `weight_decay`, and at `init` for parameters of which
    none was prepared with an `NM`.

    !!! example

        ```python
        model, _ = prepare_qat(model, [Rule(r".*weight", NM(2, 4))])
        optimizer = optax.chain(sr_ste(), optax.adam(1e-3))
        ```
    """
    check_range("weight_decay", weight_decay, least=0)

    def init(params):
        if not _sparse(params):
            raise ValueError(
                "sr_ste: `params` has no weight that is an N:M choice in training. "
                "Prepare the model with `prepare_qat(model, [Rule(pattern, NM(2, 4))])`"
                " before."
            )
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "sr_ste: `params` must be passed to `update` too, as in "
                "`optimizer.update(gradients, state, params)`."
            )
        new = {}
        for keys, node in _sparse(params).items():
            weight, gradient = node.weight, get(updates, keys)
            pull = jnp.where(nm_mask(weight, node.spec), 0, weight_decay * weight)
            new[keys] = gradient + pull.astype(gradient.dtype)
        return replace(updates, new), state

    return optax.GradientTransformation(init, update)


def _sparse(params: PyTree) -> dict:
    """By the keys of its array, every weight that is an N:M choice in training."""
    inside = jtu.GetAttrKey("weight")
    return {
        (*place.keys, inside): place.value
        for place in places(params)
        if isinstance(place.value, FakeQuantArray)
        and isinstance(place.value.spec, NM)
        and hasattr(place.value.weight, "dtype")
    }
