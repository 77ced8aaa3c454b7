from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ._gated_norm import GatedRMSNorm
from ._norm import LayerNorm, RMSNorm


_NORMS = (
    RMSNorm,
    LayerNorm,
    GatedRMSNorm,
    eqx.nn.RMSNorm,
    eqx.nn.LayerNorm,
    eqx.nn.GroupNorm,
    eqx.nn.BatchNorm,
)


def weight_decay_mask(model: PyTree) -> PyTree[bool]:
    """Which arrays of a model weight decay should act on.

    Matrices, convolution kernels and embeddings decay. Biases, the parameters of norms
    and whatever a layer lists in its class attribute `no_weight_decay` (`A_log` and
    `D` of `Mamba`) do not: pulling those towards zero changes what a layer is, not how
    large it is. Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, arXiv
    1711.05101. The choice follows from the owner of an array, not from its rank, so
    that it is the same for blocks whose parameters are stacked along a layer axis.

    **Arguments:**

    - `model`: any PyTree; layers of this library and of `equinox.nn` are known.

    **Returns:**

    The structure of `model` with `True` where an array decays, `False` at every other
    leaf. Pass it to `optax.adamw(..., mask=...)`.

    !!! example

        ```python
        params = eqx.filter(model, eqx.is_inexact_array)
        optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=weight_decay_mask)
        ```
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        if not eqx.is_inexact_array(leaf):
            return False
        node = model
        for entry in path:
            match entry:
                case jax.tree_util.GetAttrKey(name):
                    if name.startswith("bias") or isinstance(node, _NORMS):
                        return False
                    if name in getattr(type(node), "no_weight_decay", ()):
                        return False
                    node = getattr(node, name)
                case jax.tree_util.SequenceKey(index):
                    node = node[index]
                case jax.tree_util.DictKey(key):
                    node = node[key]
        return True

    return jax.tree_util.tree_map_with_path(decays, model)
