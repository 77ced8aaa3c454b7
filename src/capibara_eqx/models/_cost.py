import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..layers import (
    GLU,
    MLP,
    S4,
    S4D,
    S5,
    AbstractAttention,
    BitNet158,
    ByteEmbedding,
    Conv1DBlock,
    DeltaNet,
    Dropout,
    Embedding,
    GatedRMSNorm,
    HybridSSM,
    LayerNorm,
    Linear,
    LinearSSM,
    Mamba,
    Mamba2,
    Mamba3,
    MesaNet,
    MetaLinearAttention,
    MixtureOfRookies,
    MoE,
    PatchEmbedding,
    RMSNorm,
    SparseCapibara,
    SwiGLU,
    TokenEmbedding,
    TTTLinear,
    UltraSSM,
)
from ._block import ResidualBlock
from ._language_model import LanguageModel
from ._transformer_block import TransformerBlock


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


def model_cost(model: LanguageModel, max_len: int | None = None) -> list[Cost]:
    r"""Parameters, state and work of a model, part by part, the sum last.

    Work is counted by formula, since XLA counts the body of a loop once, for the
    forward pass of one token and without what is done once a call:

    - A product of matrices: two operations a weight. Norms: four a channel.
    - Mamba: seven a state ($\Delta A$, exp, decay, input, sum, readout, its sum) and
        four a channel. Mamba-2: five a state, since its decays are one a head, and four
        a channel. Mamba-3: five a state, six a channel, four a head and column of its
        state, and 21 a head and angle.
    - S4D: seven a real state and four a channel; S4: 12 a state and 8 a rank of it; S5:
        four (a product of complex numbers is six); `LinearSSM`: its products.
    - `DeltaNet`: six a number of its memories, seven with a decay, two a value and
        three a query and key. `MetaLinearAttention`: five, six and seven.
    - `MesaNet`: eight a number of either of its two memories, and two a number and 12 a
        channel for each step of conjugate gradients; or those of a Cholesky factor.
    - `TTTLinear`, of what a whole mini-batch takes: six a fast weight, four a channel
        and token of the mini-batch, two a weight at its end, and 31 a channel.
    - Mixtures of experts: the router, the shared expert and the `top_k` experts that a
        token takes, though all have parameters and some implementations compute all;
        with product keys the query and a product with every key, and not what finds the
        best pairs.
    - Attention: its four or more maps, two products a score and five operations for its
        softmax, with `max_len` tokens in view, or as many as its window.

    **Arguments:**

    - `model`: of layers of this library.
    - `max_len`: tokens that a cache of attention holds, and that a token sees; needed
        if a layer has attention without a window.

    **Returns:**

    One `Cost` a block (all blocks of a scanned stack together), one for embedding,
    norm and head each, and the total. A tied head has work but no parameters.

    **Raises:**

    `ValueError` for a layer whose work is not known, or without a `max_len` that is
    needed.

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
            flops = _flops(block, max_len)
            cache = eqx.filter_eval_shape(block.init_cache, max_len=max_len)
            rows.append(_cost(f"block {index}", block, cache, flops))
    else:
        flops = model.stack.num_blocks * _flops(blocks, max_len)
        cache = eqx.filter_eval_shape(model.stack.init_cache, max_len=max_len)
        name = f"{model.stack.num_blocks} blocks"
        rows.append(_cost(name, blocks, cache, flops))
    rows.append(_cost("norm", model.norm, None, _flops(model.norm, None)))
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


def _flops(layer: Any, max_len: int | None) -> int:
    match layer:
        case ResidualBlock():
            parts = (layer.norm, layer.mixer)
            return sum(_flops(part, max_len) for part in parts)
        case TransformerBlock() | UltraSSM():
            mixing = (layer.mixer_norm, layer.mixer)
            parts = (*mixing, layer.feed_forward_norm, layer.feed_forward)
            return sum(_flops(part, max_len) for part in parts if part is not None)
        case SparseCapibara():
            # With all zeros: the products are dense ones.
            parts = [part for block in layer.blocks for part in vars(block).values()]
            return sum(_flops(part, max_len) for part in parts)
        case AbstractAttention():
            return _attention(layer, max_len)
        case HybridSSM():
            return _hybrid(layer, max_len)
    for kind, formula in _FORMULAS.items():
        if isinstance(layer, kind):
            return formula(layer)
    raise ValueError(
        f"The work of a {type(layer).__name__} is not known. Add its formula to the "
        "table of `model_cost`."
    )


def _linear(layer: Linear | BitNet158) -> int:
    norm = _flops(layer.norm, None) if isinstance(layer, BitNet158) else 0
    return 2 * layer.in_features * layer.out_features + norm


def _conv(layer: Conv1DBlock) -> int:
    taps = layer.in_channels // layer.groups * layer.kernel_size
    norm = 0 if layer.norm is None else _flops(layer.norm, None)
    return 2 * taps * layer.out_channels + norm


def _mamba(layer: Mamba) -> int:
    maps = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    scan = 7 * layer.d_inner * layer.d_state + 4 * layer.d_inner
    return sum(map(_linear, maps)) + _conv(layer.conv) + scan


def _mamba2(layer: Mamba2) -> int:
    maps = _linear(layer.in_proj) + _linear(layer.out_proj) + _conv(layer.conv)
    scan = 5 * layer.d_inner * layer.d_state + 4 * layer.d_inner
    return maps + scan + _flops(layer.norm, None)


def _mamba3(layer: Mamba3) -> int:
    maps = _linear(layer.in_proj) + _linear(layer.out_proj)
    scan = 5 * layer.d_inner * layer.d_state + 5 * layer.d_inner
    norms = 2 * layer.n_groups * _flops(layer.B_norm, None)
    gate = layer.d_inner if layer.norm is None else _flops(layer.norm, None)
    # An angle with its cosine and sine, and three products of complex numbers of six
    # operations each: of the turn, and of a pair of B and of C.
    turns = 21 * layer.n_heads * layer.angles
    # Two biases, and the product of B and C.
    heads = 4 * layer.n_heads * layer.d_state
    return maps + scan + norms + gate + turns + heads


def _delta_net(layer: DeltaNet) -> int:
    named = (layer.q_proj, layer.k_proj, layer.v_proj, layer.beta_proj, layer.o_proj)
    maps = [*named, layer.dt_proj, layer.gate_proj]
    work = sum(_linear(linear) for linear in maps if linear is not None)
    if layer.conv is not None:
        work += _conv(layer.conv)
    state = (6 if layer.dt_proj is None else 7) * layer.v_head_dim * layer.head_dim
    gate = 0 if layer.gate_proj is None else layer.v_head_dim
    channels = 2 * layer.v_head_dim + 2 * 3 * layer.head_dim + gate
    return work + layer.n_heads * (state + channels + _flops(layer.norm, None))


def _meta_linear(layer: MetaLinearAttention) -> int:
    maps = (layer.q_proj, layer.decay_proj, layer.v_proj, layer.gate_proj, layer.o_proj)
    state = 5 * layer.v_head_dim * layer.head_dim
    channels = 6 * layer.v_head_dim + 7 * layer.head_dim
    heads = layer.n_heads * (state + channels + _flops(layer.norm, None))
    return sum(map(_linear, maps)) + _conv(layer.conv) + heads


def _mesa_net(layer: MesaNet) -> int:
    d = layer.head_dim
    named = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    maps = [*named, layer.decay_proj, layer.beta_proj, layer.gate_proj]
    work = sum(_linear(linear) for linear in maps if linear is not None)
    if layer.solver == "cg":
        solve = layer.cg_steps * (2 * d * d + 12 * d) + 2 * d
    else:  # A factor, and two triangular systems.
        solve = d**3 // 3 + 2 * d * d + d
    # Lengths of q and k, and what k and v count.
    channels = 2 * 3 * d + 2 * d
    gate = 0 if layer.gate_proj is None else d
    heads = 8 * d * d + solve + channels + gate + _flops(layer.norm, None)
    return work + _conv(layer.conv) + layer.n_heads * heads


def _ttt_linear(layer: TTTLinear) -> int:
    d = layer.head_dim
    named = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    maps = [*named, layer.rate_proj, layer.gate_proj]
    work = sum(_linear(linear) for linear in maps if linear is not None)
    weights, length = (d + 1) * d, layer.mini_batch_size
    # Read by the key and the query, an outer product, and taken in once; attention.
    state = 6 * weights + 2 * weights // length + length * (4 * d + 3)
    # The inner norm twice and its gradient once; what is told apart; lengths.
    channels = 2 * 7 + 9 + 8 + (6 if layer.qk_norm else 0)
    gate = 0 if layer.gate_proj is None else layer.d_model
    norm = 0 if layer.norm is None else _flops(layer.norm, None)
    own = layer.n_heads * state + channels * layer.d_model
    return work + own + gate + norm


def _linear_ssm(layer: LinearSSM) -> int:
    matrices = (layer.A, layer.B, layer.C, layer.D)
    residual = 0 if layer.residual_proj is None else _linear(layer.residual_proj)
    return _conv(layer.conv) + 2 * sum(m.size for m in matrices) + residual


def _s5(layer: S5) -> int:
    # Real inputs and outputs: two real products a complex weight.
    maps = 2 * layer.B.size + 2 * layer.C.size
    return maps + 8 * layer.half + _linear(layer.gate)


def _state_space(layer: S4D | S4) -> int:
    state = 7 if isinstance(layer, S4D) else 12 + 8 * layer.P.shape[-2]
    recurrence = state * layer.d_model * layer.d_state + 4 * layer.d_model
    return recurrence + _linear(layer.output.proj)


def _gated(layer: GLU | SwiGLU) -> int:
    return sum(map(_linear, (layer.gate_proj, layer.up_proj, layer.down_proj)))


def _experts(layer: MoE) -> int:
    shared = 0 if layer.shared is None else _gated(layer.shared)
    chosen = layer.top_k * 3 * 2 * layer.d_model * layer.d_ff
    return _linear(layer.router) + chosen + shared


def _rookies(layer: MixtureOfRookies) -> int:
    chosen = layer.n_heads * layer.top_k * 2 * 2 * layer.d_model * layer.rookie_size
    if isinstance(layer.router, Linear):
        return _linear(layer.router) + chosen
    query, keys, norm = layer.router.query, layer.router.keys, layer.router.norm
    norms = 0 if norm is None else layer.n_heads * _flops(norm, None)
    return _linear(query) + norms + 2 * keys.size + chosen


def _attention(layer: AbstractAttention, max_len: int | None) -> int:
    kinds = Linear | BitNet158
    leaves = jax.tree.leaves(layer, is_leaf=lambda node: isinstance(node, kinds))
    maps = sum(_linear(leaf) for leaf in leaves if isinstance(leaf, kinds))
    # Shapes of a cache tell how many tokens are seen, and refuse a missing `max_len`.
    cache = eqx.filter_eval_shape(layer.init_cache, max_len=max_len)
    (_, d), (_, v) = layer.cached_shapes
    return maps + layer.n_heads * cache.slots * (2 * d + 2 * v + 5)


def _hybrid(layer: HybridSSM, max_len: int | None) -> int:
    cache = layer.init_cache  # A switch has work in the branch of its cache alone.
    cache = eqx.filter_eval_shape(cache, max_len=max_len)
    branches = ((layer.ssm, cache.ssm), (layer.attention, cache.attention))
    work = sum(_flops(part, max_len) for part, held in branches if held is not None)
    return (
        work if layer.gate is None else work + _linear(layer.gate) + 4 * layer.d_model
    )


_FORMULAS: dict[type, Callable[[Any], int]] = {
    Linear: _linear,
    BitNet158: _linear,
    Embedding: lambda layer: 0,
    ByteEmbedding: lambda layer: 0,
    TokenEmbedding: lambda layer: 0,
    PatchEmbedding: lambda layer: _linear(layer.proj),
    Dropout: lambda layer: 0,
    RMSNorm: lambda layer: 4 * layer.d_model,
    LayerNorm: lambda layer: 6 * layer.d_model,
    Conv1DBlock: _conv,
    DeltaNet: _delta_net,
    GatedRMSNorm: lambda layer: 5 * layer.d_model,
    LinearSSM: _linear_ssm,
    Mamba: _mamba,
    Mamba2: _mamba2,
    Mamba3: _mamba3,
    MesaNet: _mesa_net,
    MetaLinearAttention: _meta_linear,
    S4: _state_space,
    S4D: _state_space,
    S5: _s5,
    TTTLinear: _ttt_linear,
    GLU: _gated,
    SwiGLU: _gated,
    MLP: lambda layer: _linear(layer.up_proj) + _linear(layer.down_proj),
    MoE: _experts,
    MixtureOfRookies: _rookies,
}
