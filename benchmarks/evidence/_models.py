"""The models that the experiments share."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from capibara_eqx.layers import AbstractSequenceMixer, Linear
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


class ReLUNetwork(eqx.Module):
    """Affine maps with ReLUs between them, drawn as He et al. do (arXiv 1502.01852)."""

    maps: tuple[Linear, ...]

    def __init__(self, widths: Sequence[int], *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(widths) - 1)
        sizes = zip(widths[:-1], widths[1:], keys, strict=True)
        self.maps = tuple(he_linear(before, after, key=k) for before, after, k in sizes)

    def __call__(
        self, x: Float[Array, "*batch d_in"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_out"]:
        del key
        for linear in self.maps[:-1]:
            x = jax.nn.relu(linear(x))
        return self.maps[-1](x)


def he_linear(d_in: int, d_out: int, *, key: PRNGKeyArray) -> Linear:
    """Normal weights of variance `2 / d_in`, no bias to begin with."""
    linear = Linear(d_in, d_out, key=key)
    weight = jax.random.normal(key, (d_out, d_in)) * (2 / d_in) ** 0.5
    return eqx.tree_at(
        lambda linear: (linear.weight, linear.bias),
        linear,
        (weight, jnp.zeros(d_out)),
    )
