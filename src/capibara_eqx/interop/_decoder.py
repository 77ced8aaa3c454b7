from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax

from ..layers import Attention, MoE, RopeScaling, SwiGLU
from ..models import LanguageModel, TransformerBlock


class Decoder(NamedTuple):
    """Everything that decides the structure of a language model of the Llama family.

    It lies between a config.json and a `LanguageModel`: both are made from it and
    both are read into it. `windows` has one entry a layer.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dropout_p: float
    num_experts: int | None
    top_k: int | None


def abstract_model(
    decoder: Decoder,
    *,
    scan: bool = False,
    remat: str | Callable[..., bool] | None = None,
    implementation: str | None = None,
) -> LanguageModel:
    """The model with `jax.ShapeDtypeStruct`s for arrays: nothing is computed.

    **Raises:**

    `ValueError`: what the layers say to sizes that do not go together.
    """

    def build(key):
        # Traced once for each kind of block, however many layers there are.
        block = {
            window: _block(decoder, window, implementation, key)
            for window in dict.fromkeys(decoder.windows)
        }
        return LanguageModel(
            decoder.vocab_size,
            decoder.d_model,
            [block[window] for window in decoder.windows],
            scan=scan,
            remat=remat,
            tie_embeddings=decoder.tie_embeddings,
            eps=decoder.eps,
            key=key,
        )

    return eqx.filter_eval_shape(build, jax.random.key(0))


def _block(decoder, window, implementation, key) -> TransformerBlock:
    mixer = Attention(
        decoder.d_model,
        decoder.n_heads,
        decoder.n_kv_heads,
        decoder.head_dim,
        rope_enabled=True,
        rope_base=decoder.rope_base,
        rope_scaling=decoder.rope_scaling,
        dropout_p=decoder.dropout_p,
        window=window,
        qk_norm=decoder.qk_norm,
        use_bias=decoder.qkv_bias,
        use_out_bias=decoder.out_bias,
        eps=decoder.eps,
        implementation=implementation,
        key=key,
    )
    if decoder.num_experts is None or decoder.top_k is None:
        feed_forward = SwiGLU(decoder.d_model, decoder.d_ff, decoder.mlp_bias, key=key)
    else:
        feed_forward = MoE(
            decoder.d_model, decoder.num_experts, decoder.top_k, decoder.d_ff, key=key
        )
    return TransformerBlock(mixer, feed_forward, decoder.d_model, eps=decoder.eps)
