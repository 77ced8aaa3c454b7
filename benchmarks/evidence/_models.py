"""The models that the experiments share."""

from collections.abc import Callable

import jax
from jaxtyping import PRNGKeyArray

from capibara_eqx.layers import AbstractSequenceMixer
from capibara_eqx.models import LanguageModel, ResidualBlock


def language_model(
    mixer: Callable[[PRNGKeyArray], AbstractSequenceMixer],
    vocab_size: int,
    d_model: int,
    layers: int,
    *,
    key: PRNGKeyArray,
) -> LanguageModel:
    """Pre-norm residual blocks, each around what `mixer` makes of a key, and no MLP."""
    key, *keys = jax.random.split(key, layers + 1)
    blocks = [ResidualBlock(mixer(block_key), d_model) for block_key in keys]
    return LanguageModel(vocab_size, d_model, blocks, tie_embeddings=False, key=key)
