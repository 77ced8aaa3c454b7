import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Names(NamedTuple):
    """Where the arrays of a `LanguageModel` lie on disk.

    `model`: tensors by path. `layer`: what the names of one layer begin with. `block`:
    the name behind it by what a path in a block begins with. `experts`: weights of
    all experts in one array, one tensor an expert on disk. `derived`: tensors of older
    files that follow from config.json, if there are any.
    """

    model: Mapping[str, str]
    layer: str
    block: Mapping[str, str]
    experts: Mapping[str, str] = {}
    derived: re.Pattern[str] | None = None

    @property
    def head(self) -> str:
        return self.model["head.weight"]

    @property
    def embedding(self) -> str:
        return self.model["embedding.weight"]


LLAMA = Names(
    model={
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    layer="model.layers.{layer}.",
    block={
        "mixer_norm": "input_layernorm",
        "mixer.q_proj": "self_attn.q_proj",
        "mixer.k_proj": "self_attn.k_proj",
        "mixer.v_proj": "self_attn.v_proj",
        "mixer.o_proj": "self_attn.o_proj",
        "mixer.o_proj.norm": "self_attn.attn_sub_norm",
        "mixer.q_norm": "self_attn.q_norm",
        "mixer.k_norm": "self_attn.k_norm",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate_proj": "mlp.gate_proj",
        "feed_forward.up_proj": "mlp.up_proj",
        "feed_forward.down_proj": "mlp.down_proj",
        "feed_forward.down_proj.norm": "mlp.ffn_sub_norm",
        "feed_forward.router": "block_sparse_moe.gate",
    },
    experts={
        "feed_forward.gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "feed_forward.up": "block_sparse_moe.experts.{expert}.w3.weight",
        "feed_forward.down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    derived=re.compile(r"(^|\.)rotary_emb\.inv_freq$"),
)
# Of both versions: what only one has does not stand in the way of the other.
MAMBA = Names(
    model={
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    },
    layer="backbone.layers.{layer}.",
    block={
        "norm": "norm",
        "mixer": "mixer",  # of A_log, D and dt_bias
        "mixer.in_proj": "mixer.in_proj",
        "mixer.conv": "mixer.conv1d",
        "mixer.x_proj": "mixer.x_proj",
        "mixer.dt_proj": "mixer.dt_proj",
        "mixer.norm": "mixer.norm",
        "mixer.out_proj": "mixer.out_proj",
    },
)

_IN_BLOCK = re.compile(r"stack\.blocks(?:\.(?P<layer>\d+))?\.(?P<path>.+)")


def tensor_names(
    names: Names, path: str, shape: tuple[int, ...]
) -> Mapping[tuple[int, ...], str]:
    """Names on disk of the leaf at `path`: by index along the axes that are split.

    The index is empty for a leaf that is one tensor, and the mapping is for a leaf
    that has no place on disk. Layers of a scanned stack are split along the first
    axis, experts along the next.
    """
    inside = _IN_BLOCK.fullmatch(path)
    if inside is None:
        return {(): names.model[path]} if path in names.model else {}
    layer, path = inside["layer"], inside["path"]
    name = names.experts.get(path)
    if name is None:
        module, _, kind = path.rpartition(".")
        if module not in names.block:
            return {}
        name = f"{names.block[module]}.{kind}"
    axes = [layer is None, path in names.experts]
    found = {}
    for index in np.ndindex(shape[: sum(axes)]):
        at = list(index)
        number = at.pop(0) if layer is None else layer
        suffix = name.format(expert=at[0]) if at else name
        found[index] = names.layer.format(layer=number) + suffix
    return found
