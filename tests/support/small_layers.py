"""Layers around other layers, of sizes at which they compile fast."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from capibara_eqx.layers import (
    Attention,
    Bidirectional,
    BitNet158,
    Conv1DBlock,
    HybridSSM,
    Linear,
    LoRALinear,
    Mamba,
    RookiePredictor,
    UltraSSM,
)


def hybrid(*, key, mode: str | None = None, **options: Any) -> HybridSSM:
    """A mix unless `mode` says otherwise, or `options` leave a branch out."""
    ssm_key, attention_key, key = jax.random.split(key, 3)
    branches: dict[str, Any] = {}
    if options.get("use_mamba", True):
        branches["ssm"] = Mamba(4, 2, d_conv=2, key=ssm_key)
    if options.get("use_transformer", True):
        branches["attention"] = Attention(4, 2, rope_enabled=True, key=attention_key)
    if mode is None:
        mode = "mix" if len(branches) == 2 else "switch"
    return HybridSSM(4, mode=mode, **branches, **options, key=key)


def hybrid_of_convolutions(*, key) -> HybridSSM:
    """A mix of the mixers that compile fastest."""
    ssm_key, attention_key, key = jax.random.split(key, 3)
    ssm = Conv1DBlock(3, 3, 2, groups=3, key=ssm_key)
    attention = Conv1DBlock(3, 3, 3, dilation=2, activation="gelu", key=attention_key)
    return HybridSSM(3, mode="mix", ssm=ssm, attention=attention, key=key)


def ultra(inside: str = "conv", *, key, **options: Any) -> UltraSSM:
    """Chunks that are shorter than a row and do not divide it."""
    mixer_key, key = jax.random.split(key)
    if inside == "conv":
        mixer = Conv1DBlock(3, 3, 3, groups=3, key=mixer_key)
    else:
        mixer = Mamba(3, 2, d_conv=2, key=mixer_key)
    some = {"d_ff": 4, "compute_dtype": None, "remat": True, "chunk_size": 4}
    return UltraSSM(mixer, 3, **(some | options), key=key)


def bidirectional(*, key, merge: str = "gate") -> Bidirectional:
    """Two mixers of different reach."""
    forward_key, reverse_key, key = jax.random.split(key, 3)
    forward = Conv1DBlock(3, 3, 3, key=forward_key)
    reverse = Conv1DBlock(3, 3, 2, activation="gelu", key=reverse_key)
    return Bidirectional(forward, reverse, 3, merge, key=key)


def predictor(*, key) -> RookiePredictor:
    """Of neurons in three directions, so that some follow others."""
    linear_key, samples_key, key = jax.random.split(key, 3)
    linear = Linear(5, 9, key=linear_key)
    directions = jax.random.normal(key, (3, 5))[jnp.arange(9) % 3]
    linear = eqx.tree_at(lambda m: m.weight, linear, linear.weight + directions)
    return RookiePredictor(linear, jax.random.normal(samples_key, (40, 5)))


def packed_bitnet(*, key) -> BitNet158:
    return BitNet158(5, 3, key=key).quantize()


def lora_linear(*, key) -> LoRALinear:
    """What is rounded: the map, the two of the adapter, and the lengths of rows."""
    return LoRALinear(5, 3, 2, alpha=3, rs=True, dora=True, key=key)
