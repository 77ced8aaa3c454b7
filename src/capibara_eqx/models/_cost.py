import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..layers import Conv1DBlock, Dropout, Embedding, LayerNorm, Linear, Mamba, RMSNorm
from ._block import ResidualBlock
from ._language_model import LanguageModel


class Cost(NamedTuple):
    """What a part of a model takes.

    `parameters` counts numbers, `parameter_bytes` and `state_bytes` bytes, the latter
    of one sequence, and `flops` operations a token of the forward pass.
    """

    name: str
    parameters: int
    parameter_bytes: int
    state_bytes: int
    flops: int


def model_cost(model: LanguageModel) -> list[Cost]:
    r"""Parameters, state and work of a model, part by part, the sum last.

    Work is counted by formula, since XLA counts the body of a loop once: a product
    of matrices as two operations a weight; the scan of Mamba as seven a state
    ($\Delta A$, exp, decay, input, sum, readout, its sum) and four a channel; norms as
    four a channel. Forward, one token.

    **Arguments:**

    - `model`: of layers of this library.

    **Returns:**

    One `Cost` a block (all blocks of a scanned stack together), one for embedding,
    norm and head each, and the total. A tied head has work but no parameters.

    **Raises:**

    `ValueError` for a layer whose work is not known.

    !!! example

        ```python
        *parts, total = model_cost(model)
        print(total.parameters, total.state_bytes, total.flops)
        ```
    """
    blocks = model.stack.blocks
    rows = [_cost("embedding", model.embedding, None, 0)]
    if isinstance(blocks, tuple):
        for index, block in enumerate(blocks):
            flops = _flops(block)
            cache = eqx.filter_eval_shape(block.init_cache)
            rows.append(_cost(f"block {index}", block, cache, flops))
    else:
        flops = model.stack.num_blocks * _flops(blocks)
        cache = eqx.filter_eval_shape(model.stack.init_cache)
        name = f"{model.stack.num_blocks} blocks"
        rows.append(_cost(name, blocks, cache, flops))
    rows.append(_cost("norm", model.norm, None, _flops(model.norm)))
    head = 2 * model.d_model * model.vocab_size
    name = "head (tied)" if model.head is None else "head"
    rows.append(_cost(name, model.head, None, head))
    sums = (sum(column) for column in zip(*(row[1:] for row in rows), strict=True))
    return [*rows, Cost("total", *sums)]


def _cost(name: str, part: PyTree, cache: PyTree, flops: int) -> Cost:
    leaves = jax.tree.leaves(eqx.filter(part, eqx.is_inexact_array))
    count = sum(leaf.size for leaf in leaves)
    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    state = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
    )
    return Cost(name, count, bytes_, state, flops)


def _flops(layer: Any) -> int:
    for kind, formula in _FORMULAS.items():
        if isinstance(layer, kind):
            return formula(layer)
    raise ValueError(
        f"The work of a {type(layer).__name__} is not known. Add its formula to the "
        "table of `model_cost`."
    )


def _linear(layer: Linear) -> int:
    return 2 * layer.in_features * layer.out_features


def _conv(layer: Conv1DBlock) -> int:
    taps = layer.in_channels // layer.groups * layer.kernel_size
    norm = 0 if layer.norm is None else _flops(layer.norm)
    return 2 * taps * layer.out_channels + norm


def _mamba(layer: Mamba) -> int:
    maps = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    scan = 7 * layer.d_inner * layer.d_state + 4 * layer.d_inner
    return sum(map(_linear, maps)) + _conv(layer.conv) + scan


def _block(block: ResidualBlock) -> int:
    return _flops(block.norm) + _flops(block.mixer)


_FORMULAS: dict[type, Callable[[Any], int]] = {
    Linear: _linear,
    Embedding: lambda layer: 0,
    Dropout: lambda layer: 0,
    RMSNorm: lambda layer: 4 * layer.d_model,
    LayerNorm: lambda layer: 6 * layer.d_model,
    Conv1DBlock: _conv,
    Mamba: _mamba,
    ResidualBlock: _block,
}
