from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import DTypeLike, PRNGKeyArray

from ..internal import check_choice, check_size
from ..layers import (
    AbstractSequenceMixer,
    Attention,
    AttentionMode,
    DecoupledAttention,
    MoE,
    SwiGLU,
)
from ._language_model import LanguageModel
from ._transformer_block import TransformerBlock


def transformer_language_model(
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    *,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
    mode: AttentionMode | str | None = None,
    num_experts: int | None = None,
    top_k: int = 2,
    dropout: float = 0.0,
    rope_enabled: bool = True,
    eps: float = 1e-5,
    scan: bool = False,
    remat: str | Callable[..., bool] | None = None,
    tie_embeddings: bool = False,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
    **attention: Any,
) -> LanguageModel:
    r"""A language model of identical Transformer blocks, in the form of Llama.

    Pre-norm blocks of attention with rotary positions and SwiGLU, or experts in its
    place, without biases: Touvron et al., *LLaMA: Open and Efficient Foundation
    Language Models*, arXiv 2302.13971; with `num_experts` as Jiang et al., *Mixtral of
    Experts*, arXiv 2401.04088. The output maps of the layers are scaled by
    $1/\sqrt{2\,\mathrm{n\_layers}}$, so that the residual stream has the same variance
    whatever the depth (Radford et al., *Language Models are Unsupervised Multitask
    Learners*, 2019).

    **Arguments:**

    - `vocab_size`, `d_model`, `tie_embeddings`: see `LanguageModel`.
    - `n_layers`: number of blocks.
    - `n_heads`, `n_kv_heads`, `rope_enabled`: see `Attention`.
    - `d_ff`: width of the feed-forward, or of each expert; $8/3$ of `d_model`, rounded
        up to a multiple of 8, if not given.
    - `mode`: an `AttentionMode` or its name: `"standard"`, `"gqa"` (which needs
        `n_kv_heads`) or `"decoupled"`; the first or second by `n_kv_heads` if not
        given.
    - `num_experts`, `top_k`: experts a block and a token, see `MoE`; none if not given.
    - `dropout`: see `TransformerBlock`.
    - `eps`: of all norms.
    - `scan`, `remat`: see `Stack`.
    - `dtype`: of the parameters; float32 if not given.
    - `key`: for the initial values.
    - `attention`: further arguments of `Attention` or `DecoupledAttention`: `window`,
        `rope_base`, `qk_norm`, `sem_dim`, ...

    **Returns:**

    A `LanguageModel`.

    **Raises:**

    `ValueError` for sizes that are not positive, a `mode` that does not go with
    `n_kv_heads`, and what the parts raise.

    !!! example

        ```python
        model = transformer_language_model(256, 64, 2, 8, n_kv_heads=2, key=key)
        ```
    """
    check_size("d_model", d_model)
    check_size("n_layers", n_layers)
    check_size("n_heads", n_heads)
    mode = _mode(mode, n_heads, n_kv_heads)
    d_ff = -(-8 * d_model // 24) * 8 if d_ff is None else d_ff
    model_key, *keys = jax.random.split(key, n_layers + 1)
    blocks = []
    for block_key in keys:
        mixer_key, ff_key = jax.random.split(block_key)
        mixer = _mixer(
            mode,
            {
                "d_model": d_model,
                "n_heads": n_heads,
                "n_kv_heads": n_kv_heads,
                "rope_enabled": rope_enabled,
                "dtype": dtype,
                "key": mixer_key,
                **attention,
            },
            eps,
        )
        if num_experts is None:
            feed_forward = SwiGLU(d_model, d_ff, dtype=dtype, key=ff_key)
            out = lambda block: block.feed_forward.down_proj.weight
        else:
            feed_forward = MoE(
                d_model, num_experts, top_k, d_ff, dtype=dtype, key=ff_key
            )
            out = lambda block: block.feed_forward.down
        block = TransformerBlock(mixer, feed_forward, d_model, dropout, eps, dtype)
        blocks.append(
            eqx.tree_at(
                lambda block, out=out: (block.mixer.o_proj.weight, out(block)),
                block,
                replace_fn=lambda weight: weight / (2 * n_layers) ** 0.5,
            )
        )
    return LanguageModel(
        vocab_size,
        d_model,
        blocks,
        scan=scan,
        remat=remat,
        tie_embeddings=tie_embeddings,
        eps=eps,
        dtype=dtype,
        key=model_key,
    )


def _mode(
    mode: AttentionMode | str | None, n_heads: int, n_kv_heads: int | None
) -> AttentionMode:
    shared = n_kv_heads is not None and n_kv_heads != n_heads
    if mode is None:
        return AttentionMode.GQA if shared else AttentionMode.STANDARD
    check_choice("mode", str(mode), [choice.value for choice in AttentionMode])
    mode = AttentionMode(mode)
    if mode is AttentionMode.STANDARD and shared:
        raise ValueError(
            f"`mode='standard'` gives every head its own keys, got n_heads={n_heads} "
            f"and n_kv_heads={n_kv_heads}. Pass mode='gqa', or leave `n_kv_heads` out."
        )
    if mode is AttentionMode.GQA and n_kv_heads is None:
        raise ValueError(
            "`mode='gqa'` needs `n_kv_heads`, a divisor of `n_heads`. Pass it, or "
            "mode='standard'."
        )
    return mode


def _mixer(
    mode: AttentionMode, arguments: dict[str, Any], eps: float
) -> AbstractSequenceMixer:
    if mode is AttentionMode.DECOUPLED:
        return DecoupledAttention(**arguments)
    return Attention(**{"eps": eps, **arguments})
