"""The table of layers that the contract tests run over, and how they are run.

One line a layer: a new layer enters every contract test by its line in `CASES`.
"""

import collections
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layer_case import Case
from support.rows import LENGTH as LENGTH
from support.rows import chunks as chunks
from support.rows import packed_rows as packed_rows
from support.rows import pieces as pieces
from support.rows import seeds as seeds
from support.small_fast_weights import FAST_WEIGHTS
from support.small_layers import (
    bidirectional,
    hybrid,
    hybrid_of_convolutions,
    lora_linear,
    packed_bitnet,
    predictor,
    ultra,
)
from support.small_state_spaces import STATE_SPACES
from support.tolerances import assert_close

from capibara_eqx.layers import (
    GLU,
    MLP,
    Attention,
    BitNet158,
    BitNetQuantizer,
    ByteEmbedding,
    Conv1DBlock,
    DecoupledAttention,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Mamba,
    MixtureOfRookies,
    MoE,
    PatchEmbedding,
    RMSNorm,
    RookiePredictor,
    SparseCapibara,
    SwiGLU,
    TokenEmbedding,
)
from capibara_eqx.models import (
    LanguageModel,
    ResidualBlock,
    Stack,
    TransformerBlock,
    mamba_language_model,
    transformer_language_model,
)


# Those that return `(y, aux)`.
_REPORTING = (Stack, MoE, MixtureOfRookies, RookiePredictor)
# Tokens that a cache must hold: a row, and what a test reads after it.
ROOM = LENGTH + 2
VOCAB = 7


def _stack(scan: bool, *, key) -> Stack:
    keys = jax.random.split(key, 2)
    blocks = [ResidualBlock(Mamba(3, 2, d_conv=2, key=k), 3) for k in keys]
    return Stack(blocks, scan=scan)


def _scanned_model(*, key) -> LanguageModel:
    return mamba_language_model(VOCAB, 3, 2, d_state=2, d_conv=2, scan=True, key=key)


def _hybrid_model(*, key) -> LanguageModel:
    """Every kind of mixer, with and without a feed-forward."""
    model_key, *keys = jax.random.split(key, 7)
    mixers = [
        Mamba(4, 2, d_conv=2, key=keys[0]),
        Conv1DBlock(4, 4, 2, dilation=2, key=keys[1]),
        Attention(4, 2, 1, rope_enabled=True, key=keys[2]),
    ]
    decoupled = DecoupledAttention(4, 2, sem_dim=2, geo_dim=4, window=3, key=keys[3])
    blocks = [
        *(ResidualBlock(mixer, 4) for mixer in mixers),
        TransformerBlock(decoupled, MoE(4, 3, 2, 3, key=keys[4]), 4),
        TransformerBlock(mixers[2], SwiGLU(4, 5, key=keys[5]), 4),
    ]
    return LanguageModel(VOCAB, 4, blocks, tie_embeddings=False, key=model_key)


_EVERYTHING: dict[str, Any] = {
    "groups": 2,
    "dilation": 2,
    "norm": "layer",
    "activation": "gelu",
    "residual": True,
}
_ODD: dict[str, Any] = {"dt_rank": 2, "activation": "gelu", "bias": True}
_ATTENTION: dict[str, Any] = {
    "rope_enabled": True,
    "qk_norm": True,
    "use_bias": True,
}
_PEER: dict[str, Any] = {
    "num_rookies": 9,
    "rookie_size": 1,
    "routing": "product_key",
    "n_heads": 2,
    "query_norm": True,
}
# Steps that are large enough for the states to count.
_MODEL: dict[str, Any] = {"width": 3, "terms": 50, "tokens": True, "padding": "any"}

CASES = (
    Case("linear", partial(Linear, 5, 3), 5, 5, mixer=False),
    Case("lora_linear", lora_linear, 5, 10, False, roundings=4, slow=True),
    Case("bitnet158", partial(BitNet158, 5, 3), 5, 10, mixer=False),
    Case("bitnet_quantizer", lambda key: BitNetQuantizer(4), 5, 1, False, slow=True),
    Case("rms_norm", lambda key: RMSNorm(5), 5, 5, mixer=False),
    Case("layer_norm", lambda key: LayerNorm(5), 5, 5, mixer=False),
    Case("embedding", partial(Embedding, VOCAB, 3), 3, 1, mixer=False, tokens=True),
    Case("byte_embedding", partial(ByteEmbedding, 3, 2), 3, 1, False, tokens=True),
    Case(
        "token_embedding",
        partial(TokenEmbedding, VOCAB, 3, "learned", 4 * LENGTH, scale=True),
        width=3,
        terms=2,
        tokens=True,
        remembers=False,
    ),
    Case(
        "patch_embedding",
        partial(PatchEmbedding, (4, 6), (2, 3), 5, 2, True, "learned"),
        width=6,
        terms=12,
        mixer=False,
        axes=(2, 4),
    ),
    Case("glu", partial(GLU, 5, 7, "geglu", True), 5, 12, mixer=False),
    Case("mlp", partial(MLP, 5, 7, d_out=3), 5, 12, mixer=False),
    Case("moe", partial(MoE, 5, 4, 2, 3, shared_d_ff=2), 5, 20, mixer=False),
    Case("rookies", partial(MixtureOfRookies, 5, 4, 3), 5, 20, mixer=False),
    Case(
        "rookies_of_keys",
        partial(MixtureOfRookies, 5, **_PEER),
        *(5, 20, False),
        slow=True,
    ),
    Case(
        "rookie_predictor",
        predictor,
        width=5,
        terms=5,
        mixer=False,
        fitted=(".slope", ".intercept"),
        slow=True,
    ),
    Case("dropout_at_inference", lambda key: Dropout(0.5, True), 5, 1, mixer=False),
    Case(
        "conv_centred",
        partial(Conv1DBlock, 3, 3, 4, causal=False, norm="rms"),
        *(3, 20, False),
        axes=(LENGTH,),
    ),
    Case("conv_depthwise", partial(Conv1DBlock, 3, 3, 4, groups=3), 3, 4),
    Case(
        "conv_everything",
        partial(Conv1DBlock, 4, 4, 3, **_EVERYTHING),
        width=4,
        terms=10,
        slow=True,
    ),
    Case(
        "conv_pointwise",
        partial(Conv1DBlock, 3, 5, 1, norm="rms", use_bias=False),
        width=3,
        terms=8,
        remembers=False,
    ),
    Case("mamba", partial(Mamba, 3), 3, 100),
    *STATE_SPACES,
    *FAST_WEIGHTS,
    Case("attention", partial(Attention, 4, 4, 2, 2, **_ATTENTION), 4, 20),
    Case(
        "decoupled_ring",
        partial(DecoupledAttention, 4, 2, 1, 2, 4, decoupled_gate=True, window=3),
        width=4,
        terms=20,
    ),
    Case(
        "sparse_capibara",
        partial(SparseCapibara, 4, 1, "1:2", n_heads=2, d_ff=6),
        width=4,
        terms=20,
        padding="input",
        slow=True,
    ),
    Case("hybrid_mix", hybrid_of_convolutions, 3, 20, slow=True),
    Case("bidirectional", bidirectional, 3, 20, mixer=False, axes=(LENGTH,)),
    Case("ultra", ultra, 3, 40, padding="input", slow=True),
    Case("model_scanned", _scanned_model, **_MODEL, cache_axes=1),
    # The rest differs from the ones above in a value or two.
    Case(
        "conv_reference",
        partial(Conv1DBlock, 2, 4, 3, activation=None, implementation="reference"),
        width=2,
        terms=6,
        slow=True,
    ),
    Case(
        "token_embedding_sinusoidal",
        partial(TokenEmbedding, VOCAB, 3, "sinusoidal"),
        width=3,
        terms=2,
        tokens=True,
        remembers=False,
        slow=True,
    ),
    Case("mamba_odd", partial(Mamba, 3, 5, 3, expand=3, **_ODD), 3, 60, slow=True),
    Case("mamba_no_conv", partial(Mamba, 3, 1, 1, conv_bias=False), 3, 20, slow=True),
    Case(
        "mamba_reference",
        partial(Mamba, 3, 2, 2, implementation="reference"),
        *(3, 20),
        slow=True,
    ),
    Case(
        "mamba_associative",
        partial(Mamba, 3, 2, 2, implementation="associative"),
        *(3, 20),
        slow=True,
    ),
    Case("stack_list", partial(_stack, False), 3, 50, padding="input", slow=True),
    Case(
        "stack_scanned",
        partial(_stack, True),
        width=3,
        terms=50,
        padding="input",
        cache_axes=1,
        slow=True,
    ),
    Case(
        "model_llama",
        partial(transformer_language_model, VOCAB, 4, 2, 2, n_kv_heads=1),
        **_MODEL,
        # Two blocks of 9 in attention and 6 in the feed-forward, norm and head.
        roundings=32,
        slow=True,
    ),
    Case("bitnet_affine", partial(BitNet158, 5, 3, True, 4), 5, 10, False, slow=True),
    Case("bitnet_packed", packed_bitnet, 5, 10, mixer=False, slow=True),
    Case("model_hybrid", _hybrid_model, **_MODEL, slow=True),
    Case("hybrid_mamba_attention", hybrid, 4, 60, slow=True),
    Case("ultra_mamba", partial(ultra, "mamba"), 3, 60, padding="input", slow=True),
    Case("hybrid_ssm", partial(hybrid, use_transformer=False), 4, 60, slow=True),
    Case(
        "sparse_capibara_dynamic",
        partial(SparseCapibara, 4, 2, "2:4", True, n_heads=2, d_ff=8),
        width=4,
        terms=20,
        padding="input",
        slow=True,
    ),
    Case("attention_ring", partial(Attention, 3, 1, window=3), 3, 20, slow=True),
    Case("attention_plain", partial(Attention, 3, 3), 3, 20, slow=True),
    Case(
        "decoupled_plain",
        partial(DecoupledAttention, 4, 2, 1, 2, 4, 6, rope_enabled=False),
        width=4,
        terms=20,
        slow=True,
    ),
)


def each(kind: str | None = None):
    """Parametrise a test over the table, or over a part of it.

    The parts are "pointwise", "mixer", and "memory": the mixers that remember.
    """

    params = [
        pytest.param(case, marks=pytest.mark.slow if case.slow else (), id=case.name)
        for case in CASES
        if kind is None or kind in case.kinds
    ]
    return pytest.mark.parametrize("case", params)


@functools.cache
def layer_of(case: Case, seed: int = 0) -> Any:
    """The layer, moved away from its initial ones and zeros, which hide mistakes."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        noise = jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)
        return leaf + noise

    return jax.tree.map(moved, case.make(key=jax.random.key(seed)))


def inputs(case: Case, shape: tuple[int, ...], seed: int, dtype: str = "float32"):
    """Token ids or normal values, `shape` being the batch and sequence axes."""
    rng = np.random.default_rng(seed)
    if case.tokens:
        return jnp.asarray(rng.integers(0, VOCAB, shape), "int32")
    return jnp.asarray(rng.standard_normal((*shape, case.width)), dtype)


def call(layer, x, ids=None):
    y = layer(x) if ids is None else layer(x, segment_ids=ids)
    return y[0] if isinstance(layer, _REPORTING) else y


def prefill(layer, x, cache, ids=None):
    return layer.prefill(x, cache, segment_ids=ids)


def step(layer, x, cache):
    return layer.step(x, cache)


class Compiled:
    """A jitted function that counts how often each shape of its arguments is traced."""

    def __init__(self, function: Callable[..., Any]):
        self.traces = collections.Counter()

        def traced(*args):
            leaves = jax.tree.leaves(eqx.filter(args, eqx.is_array))
            self.traces[tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)] += 1
            return function(*args)

        self.run: Any = eqx.filter_jit(traced)


@functools.cache
def compiled(case: Case, function: Callable[..., Any]) -> Compiled:
    """`function` for this case, shared by all tests."""
    return Compiled(function)


def run(case: Case, function: Callable[..., Any], *args: Any) -> Any:
    """`function(layer, *args)`, compiled once a shape; arrays come back as NumPy."""
    out = compiled(case, function).run(layer_of(case), *args)
    return jax.tree.map(np.asarray, out)


def fresh(case: Case, batch: tuple[int, ...] = ()) -> Any:
    return jax.tree.map(np.asarray, layer_of(case).init_cache(batch, max_len=ROOM))


def close(
    case: Case,
    got: Any,
    want: Any,
    name: str,
    dtype: str = "float32",
    terms: float = 1e-30,
) -> None:
    """The leaves agree: floats up to rounding, everything else exactly.

    `terms` is the size of the terms of the sums, where all results may be small.
    """
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, left), right in pairs:
        label = f"{name}{jax.tree_util.keystr(path)}"
        if np.issubdtype(np.asarray(right).dtype, np.integer):
            np.testing.assert_array_equal(left, right, err_msg=label)
        else:
            assert_close(
                left, right, dtype=dtype, length=case.terms, terms=terms, name=label
            )


def root_mean_square(values: np.ndarray) -> float:
    """The size of the terms behind values that are small only where these cancel."""
    return float(np.sqrt(np.mean(np.square(values, dtype="float64"))))


def floats(tree: Any) -> Any:
    """The floating point leaves: what is remembered, without the ids."""
    return eqx.filter(tree, lambda leaf: np.issubdtype(leaf.dtype, np.floating))
