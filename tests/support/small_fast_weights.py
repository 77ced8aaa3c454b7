"""Layers of fast weights of the contract suite, as small as they can be.

Their outputs are normalised a head, by which the rounding of one that is almost zero
would fill it: what is added to the mean square is of the size of what is normalised.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
from support.layer_case import Case

from capibara_eqx.layers import DeltaNet, MetaLinearAttention


_DELTA: dict[str, Any] = {"d_conv": 3, "norm_eps": 0.5, "chunk_size": 4}
_GATED: dict[str, Any] = {"gated": True, "output_gate": True, "conv_bias": True}
_PLAIN: dict[str, Any] = {
    "use_short_conv": False,
    "negative_eigenvalues": True,
    "norm_eps": 0.5,
}
# Short memories: what is taken in is as large as what stands beside it.
_META: dict[str, Any] = {"temperature": 1.0, "norm_eps": 0.5, "chunk_size": 4}


def _meta(*args: Any, key, **options: Any) -> MetaLinearAttention:
    """With numbers of order one, for heads not to be differences of equal numbers."""
    layer = MetaLinearAttention(*args, **_META | options, key=key)
    return jax.tree.map(lambda x: 4 * x if eqx.is_inexact_array(x) else x, layer)


FAST_WEIGHTS = (
    Case("delta_net", partial(DeltaNet, 3, 1, 2, 3, **_DELTA), 3, 40),
    Case(
        "delta_net_gated",
        partial(DeltaNet, 4, 2, **{**_DELTA, **_GATED}),
        width=4,
        terms=40,
        slow=True,
    ),
    Case(
        "delta_net_no_conv",
        partial(DeltaNet, 4, 2, 3, **_PLAIN),
        width=4,
        terms=40,
        slow=True,
    ),
    Case("meta_linear", partial(_meta, 4, 1, 2, 3), 4, 40),
    Case(
        "meta_linear_heads",
        partial(_meta, 4, 2, chunk_size=None),
        width=4,
        terms=40,
        slow=True,
    ),
)
