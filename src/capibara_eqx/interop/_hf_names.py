import re
from collections.abc import Mapping

import numpy as np


# A path in `LanguageModel`, and the tensor on disk.
MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# A layer in a block, and the one behind `model.layers.{i}.` on disk.
BLOCK = {
    "mixer_norm": "input_layernorm",
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.o_proj": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
    "feed_forward.router": "block_sparse_moe.gate",
}
# Weights of all experts in one array, one tensor an expert on disk.
EXPERTS = {
    "feed_forward.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "feed_forward.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "feed_forward.down": "block_sparse_moe.experts.{expert}.w2.weight",
}
# Buffers that older files hold and that follow from config.json.
DERIVED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

_IN_BLOCK = re.compile(r"stack\.blocks(?:\.(?P<layer>\d+))?\.(?P<path>.+)")


def tensor_names(path: str, shape: tuple[int, ...]) -> Mapping[tuple[int, ...], str]:
    """Names on disk of the leaf at `path`: by index along the axes that are split.

    The index is empty for a leaf that is one tensor, and the mapping is for a leaf
    that has no place on disk. Layers of a scanned stack are split along the first
    axis, experts along the next.
    """
    inside = _IN_BLOCK.fullmatch(path)
    if inside is None:
        return {(): MODEL[path]} if path in MODEL else {}
    layer, path = inside["layer"], inside["path"]
    name = EXPERTS.get(path)
    if name is None:
        module, _, kind = path.rpartition(".")
        if module not in BLOCK:
            return {}
        name = f"{BLOCK[module]}.{kind}"
    axes = [layer is None, path in EXPERTS]
    names = {}
    for index in np.ndindex(shape[: sum(axes)]):
        at = list(index)
        number = at.pop(0) if layer is None else layer
        suffix = name.format(expert=at[0]) if at else name
        names[index] = f"model.layers.{number}.{suffix}"
    return names
