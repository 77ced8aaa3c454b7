"""Transformer language models as NumPy loops, one document at a time."""

import numpy as np
from jax.typing import ArrayLike
from support import numpy_oracles as oracles
from support.attention_oracle import affine, attention_row, decoupled_row, rms_norm
from support.mamba_oracle import mamba_row, parameters
from support.model_oracle import blocks_of
from support.numpy_oracles import Array, wide

from capibara_eqx.layers import DecoupledAttention, Mamba, MoE
from capibara_eqx.models import ResidualBlock


def logits_of(model, tokens: ArrayLike) -> Array:
    """Scores of the next token at every position of one document."""
    x = wide(model.embedding.weight)[np.asarray(tokens)]
    for block in blocks_of(model.stack):
        if isinstance(block, ResidualBlock):
            x = x + mixed(block.mixer, normed(block.norm, x))
            continue
        x = x + mixed(block.mixer, normed(block.mixer_norm, x))
        x = x + fed(block.feed_forward, normed(block.feed_forward_norm, x))
    x = normed(model.norm, x)
    if model.head is None:
        return x @ wide(model.embedding.weight).T
    return affine(model.head, x)


def normed(norm, x: Array) -> Array:
    return rms_norm(x, wide(norm.weight), norm.eps)


def mixed(mixer, x: Array) -> Array:
    if isinstance(mixer, Mamba):
        return mamba_row(parameters(mixer), x)[0]
    if isinstance(mixer, DecoupledAttention):
        return decoupled_row(mixer, x)
    return attention_row(mixer, x)


def fed(layer, x: Array) -> Array:
    if isinstance(layer, MoE):
        return np.stack([experts_of(layer, token) for token in x])
    gate, up = affine(layer.gate_proj, x), affine(layer.up_proj, x)
    return affine(layer.down_proj, oracles.silu(gate) * up)


def experts_of(layer: MoE, token: Array) -> Array:
    """One token: the experts of its highest probabilities, renormalised."""
    logits = wide(layer.router.weight) @ token
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities)[: layer.top_k]
    out = np.zeros_like(token)
    for expert in best:
        gate, up, down = (wide(w[expert]) for w in (layer.gate, layer.up, layer.down))
        y = down @ (oracles.silu(gate @ token) * (up @ token))
        out += probabilities[expert] / probabilities[best].sum() * y
    return out
