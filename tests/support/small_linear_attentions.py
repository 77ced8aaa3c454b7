"""Layers of fast weights of the contract suite, as small as they can be.

An output is a sum over heads that may each be almost zero: there are four, so that not
all are at once. A norm would fill such a head with its rounding: what is added to the
mean square is of the size of what is normalised.
"""

from functools import partial
from typing import Any

from support.layer_case import Case
from support.quick import filled

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
    """With numbers of order one, for heads not to be differences of equal numbers.

    What is normalised is a product of three sums, less its mean: rounding as of many
    terms more.
    """
    del key
    options = _META | options
    return filled(MetaLinearAttention, *args, **options, seed=0, size=1.5)


LINEAR_ATTENTIONS = (
    Case("delta_net", partial(DeltaNet, 3, 4, 2, 3, **_DELTA), 3, 40, slow=True),
    Case(
        "delta_net_gated",
        partial(DeltaNet, 4, 4, 2, **{**_DELTA, **_GATED}),
        width=4,
        terms=40,
        slow=True,
    ),
    Case(
        "delta_net_no_conv",
        partial(DeltaNet, 4, 4, 3, **_PLAIN),
        width=4,
        terms=40,
        slow=True,
    ),
    Case("meta_linear", partial(_meta, 4, 4, 2, 3), 4, 160, slow=True),
    Case(
        "meta_linear_halves",
        partial(_meta, 8, 4, chunk_size=None),
        width=8,
        terms=160,
        slow=True,
    ),
)
