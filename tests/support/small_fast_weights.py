"""Layers whose state learns, for the contract suite: large programs, so slow tests.

The quick ones are the comparisons with loops, caches and packing included.
"""

from functools import partial
from typing import Any

from support.layer_case import Case
from support.small_linear_attentions import LINEAR_ATTENTIONS

from capibara_eqx.layers import MesaNet, TTTLinear


# Norms that divide by little make much of rounding errors.
_SMOOTH: dict[str, Any] = {"norm_eps": 0.1}
_PLAIN: dict[str, Any] = {"output_norm": False, "gate": False, "qk_norm": True}
_GATED: dict[str, Any] = {"gate": True, "solver": "cholesky", "chunk_size": 4}

FAST_WEIGHTS = (
    *LINEAR_ATTENTIONS,
    # Mini-batches that end inside of a row, and inside of pieces of it.
    Case(
        "ttt_linear",
        partial(TTTLinear, 4, 1, mini_batch_size=4, **_SMOOTH),
        width=4,
        terms=60,
        slow=True,
    ),
    # Queries times keys, of length one, are about a root of the channels smaller than
    # their terms: like as many times the roundings as there are channels.
    Case(
        "mesa_net",
        partial(MesaNet, 5, 1, cg_steps=6, **_SMOOTH),
        width=5,
        terms=60,
        roundings=5 * 16,
        slow=True,
    ),
    Case(
        "ttt_linear_plain",
        partial(
            TTTLinear, 6, 2, mini_batch_size=3, inner_rate=2.0, **_PLAIN, **_SMOOTH
        ),
        width=6,
        terms=60,
        slow=True,
    ),
    Case(
        "mesa_net_gated",
        partial(MesaNet, 8, 2, d_conv=2, implementation="xla", **_GATED, **_SMOOTH),
        width=8,
        terms=60,
        roundings=4 * 16,
        slow=True,
    ),
)
