from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ..layers import GLU, Attention, Embedding, MoE, RMSNorm, SwiGLU
from ..models import LanguageModel, TransformerBlock
from ._decoder import Decoder, abstract_model
from ._hf_rope import without_ntk
from ._problems import some


class Described(NamedTuple):
    """A model as a `Decoder`; `None` if `problems` say what it has that none has."""

    decoder: Decoder | None
    problems: list[str]


def array_leaves(model: LanguageModel) -> dict[str, Any]:
    """Every array of a model, NumPy's too, by its path."""
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        if isinstance(leaf, kinds)
    }


def describe(model: LanguageModel) -> Described:
    """The structure of a model, or all in it that the Llama family does not have."""
    if not isinstance(model, LanguageModel):
        got = type(model).__name__
        return Described(None, [f"`model` must be a LanguageModel, got {got}"])
    stacked = model.stack.blocks
    blocks = stacked if isinstance(stacked, tuple) else (stacked,)
    problems: list[str] = []
    for i, block in enumerate(blocks):
        where = f"block {i}" if isinstance(stacked, tuple) else "the scanned block"
        problems += [f"{where}: {problem}" for problem in _block_problems(block)]
    if type(model.embedding) is not Embedding:
        kind = type(model.embedding).__name__
        problems.append(f"the embedding is {kind}, not the plain Embedding")
    if not isinstance(model.norm, RMSNorm):
        problems.append(f"the last norm is {type(model.norm).__name__}, not RMSNorm")
    if problems:
        return Described(None, problems)
    kinds = [_block(block) for block in blocks]
    differing = sorted(
        name for name in kinds[0] if any(kind[name] != kinds[0][name] for kind in kinds)
    )
    differing = [name for name in differing if name != "window"]
    if differing:
        problems.append(f"the blocks differ in {', '.join(differing)}")
    common = dict(kinds[0])
    common.pop("window")
    eps = {common.pop("eps"), (model.norm.eps,)}
    sizes = sorted({value for values in eps for value in values})
    if len(sizes) > 1:
        problems.append(f"norms have an `eps` of their own: {sizes}")
    repeats = model.stack.num_blocks // len(blocks)
    decoder = Decoder(
        vocab_size=model.vocab_size,
        windows=tuple(kind["window"] for kind in kinds) * repeats,
        eps=sizes[0],
        tie_embeddings=model.head is None,
        **common,
    )
    problems = problems or _foreign_arrays(model, decoder)
    return Described(None if problems else decoder, problems)


def _block_problems(block: Any) -> Iterator[str]:
    if type(block) is not TransformerBlock:
        yield f"{type(block).__name__} is not TransformerBlock"
        return
    if type(block.mixer) is not Attention:
        yield f"the mixer is {type(block.mixer).__name__}, not Attention"
    else:
        if not block.mixer.rope_enabled:
            yield "attention has no rotary positions (`rope_enabled`)"
        if not block.mixer.is_causal:
            yield "attention is not causal (`is_causal`)"
        if not isinstance(block.mixer.dropout.p, int | float):
            yield "the dropout of attention is no plain number"
    feed_forward = block.feed_forward
    if type(feed_forward) not in (SwiGLU, GLU, MoE):
        yield f"the feed-forward is {type(feed_forward).__name__}, not SwiGLU or MoE"
        return
    if getattr(feed_forward, "activation", "swiglu") != "swiglu":
        yield f"`activation` {feed_forward.activation!r} of the feed-forward: 'swiglu'"
    if isinstance(feed_forward, MoE):
        yield from _expert_problems(feed_forward)


def _expert_problems(experts: MoE) -> Iterator[str]:
    if experts.score != "softmax":
        yield f"the router's `score` is {experts.score!r}, not 'softmax'"
    if not experts.renormalize:
        yield "the weights of experts are not renormalised (`renormalize`)"
    if experts.capacity_factor is not None:
        yield "experts drop tokens (`capacity_factor`)"
    for name in ("shared", "selection_bias", "gate_bias", "up_bias", "down_bias"):
        if getattr(experts, name) is not None:
            yield f"experts have `{name}`"


def _block(block: Any) -> dict[str, Any]:
    mixer, feed_forward = block.mixer, block.feed_forward
    base, scaling = without_ntk(mixer.rope_base, mixer.rope_scaling, mixer.head_dim)
    norms = [block.mixer_norm, block.feed_forward_norm, mixer.q_norm, mixer.k_norm]
    experts = isinstance(feed_forward, MoE)
    maps = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    return {
        "d_model": mixer.d_model,
        "d_ff": feed_forward.d_ff,
        "n_heads": mixer.n_heads,
        "n_kv_heads": mixer.n_kv_heads,
        "head_dim": mixer.head_dim,
        "window": mixer.window,
        "eps": tuple(sorted({norm.eps for norm in norms if norm is not None})),
        "rope_base": base,
        "rope_scaling": scaling,
        "qkv_bias": any(linear.bias is not None for linear in maps),
        "out_bias": mixer.o_proj.bias is not None,
        "mlp_bias": not experts and feed_forward.gate_proj.bias is not None,
        "qk_norm": mixer.q_norm is not None,
        "dropout_p": float(mixer.dropout.p),
        "num_experts": feed_forward.num_experts if experts else None,
        "top_k": feed_forward.top_k if experts else None,
    }


def _foreign_arrays(model: LanguageModel, decoder: Decoder) -> list[str]:
    """Arrays that a model of this structure does not have, or has in other shapes."""
    scan = not isinstance(model.stack.blocks, tuple)
    expected = array_leaves(abstract_model(decoder, scan=scan))
    found = array_leaves(model)
    problems = []
    extra = [path for path in found if path not in expected]
    missing = [path for path in expected if path not in found]
    if extra or missing:
        problems.append(
            "its arrays are not those of plain layers"
            + (f"; there are also: {some(extra)}" if extra else "")
            + (f"; there are not: {some(missing)}" if missing else "")
            + ". Merge or dequantize weights that stand in for others first"
        )
    for path, leaf in found.items():
        shape = expected[path].shape if path in expected else leaf.shape
        if leaf.shape != shape:
            problems.append(f"{path} must have shape {shape}, got {leaf.shape}")
    return problems
