"""Models of Mamba blocks as compositions of NumPy loops."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from support import numpy_oracles as oracles
from support.mamba_oracle import mamba_row, parameters
from support.numpy_oracles import Array, documents, wide


def moved(tree: Any, seed: int, size: float = 0.2) -> Any:
    """A model with noise on every parameter: ones and zeros hide mistakes."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        noise = size * rng.standard_normal(leaf.shape)
        return leaf + jnp.asarray(noise, leaf.dtype)

    return jax.tree.map(noisy, tree)


def blocks_of(stack: Any) -> list[Any]:
    """The blocks one by one, of a list or of a scanned stack."""
    if isinstance(stack.blocks, tuple):
        return list(stack.blocks)
    arrays, static = eqx.partition(stack.blocks, eqx.is_array)
    return [
        eqx.combine(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), static)
        for i in range(stack.num_blocks)
    ]


def stack_row(stack: Any, x: Array) -> Array:
    """One document `(seq, d_model)` through residual Mamba blocks."""
    x = wide(x)
    for block in blocks_of(stack):
        normed = oracles.rms_norm(x, block.norm.weight, block.norm.eps)
        x = x + mamba_row(parameters(block.mixer), normed)[0]
    return x


def model_row(model: Any, tokens: Array, segment_ids: Array | None = None) -> Array:
    """Logits `(seq, vocab)` of one row of tokens; zero at padding."""
    ids = np.zeros(len(tokens), int) if segment_ids is None else segment_ids
    table = wide(model.embedding.weight)
    head = table if model.head is None else wide(model.head.weight)
    logits = np.zeros((len(tokens), model.vocab_size))
    for positions in documents(np.asarray(ids)):
        x = stack_row(model.stack, table[np.asarray(tokens)[positions]])
        normed = oracles.rms_norm(x, model.norm.weight, model.norm.eps)
        logits[positions] = normed @ head.T
    return logits
