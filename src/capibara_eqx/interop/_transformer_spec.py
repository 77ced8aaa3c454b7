from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import DTypeLike, PRNGKeyArray

from ..layers import GLU, Attention, GatedRMSNorm, MoE, RMSNorm, RopeScaling, SwiGLU
from ..models import TransformerBlock
from ._hf_rope import without_ntk
from ._structure import BlockSpec


@dataclass(frozen=True)
class TransformerSpec(BlockSpec):
    """A block of the Llama family; see `BlockSpec`."""

    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None
    rope_base: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dropout_p: float
    num_experts: int | None
    top_k: int | None

    kind: ClassVar[str] = "TransformerBlock"
    by_layer: ClassVar[frozenset[str]] = frozenset({"window"})

    @classmethod
    def problems(cls, block: Any) -> list[str]:
        """See `BlockSpec`."""
        return [*_attention_problems(block.mixer), *_fed_problems(block.feed_forward)]

    @classmethod
    def of(cls, block: Any) -> "TransformerSpec":
        """See `BlockSpec`."""
        mixer, feed_forward = block.mixer, block.feed_forward
        base, scaling = without_ntk(mixer.rope_base, mixer.rope_scaling, mixer.head_dim)
        experts = isinstance(feed_forward, MoE)
        maps = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        return cls(
            d_ff=feed_forward.d_ff,
            n_heads=mixer.n_heads,
            n_kv_heads=mixer.n_kv_heads,
            head_dim=mixer.head_dim,
            window=mixer.window,
            rope_base=base,
            rope_scaling=scaling,
            qkv_bias=any(linear.bias is not None for linear in maps),
            out_bias=mixer.o_proj.bias is not None,
            mlp_bias=not experts and feed_forward.gate_proj.bias is not None,
            qk_norm=mixer.q_norm is not None,
            dropout_p=float(mixer.dropout.p),
            num_experts=feed_forward.num_experts if experts else None,
            top_k=feed_forward.top_k if experts else None,
        )

    @staticmethod
    def norms(block: Any) -> list[RMSNorm | GatedRMSNorm]:
        """See `BlockSpec`."""
        mixer = block.mixer
        norms = [block.mixer_norm, block.feed_forward_norm, mixer.q_norm, mixer.k_norm]
        return [norm for norm in norms if norm is not None]

    def build(
        self,
        d_model: int,
        eps: float,
        *,
        implementation: str | None,
        dtype: DTypeLike | None,
        key: PRNGKeyArray,
    ) -> TransformerBlock:
        """See `BlockSpec`. Dropout, if there is any, is off."""
        mixer = Attention(
            d_model,
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            rope_enabled=True,
            rope_base=self.rope_base,
            rope_scaling=self.rope_scaling,
            dropout_p=self.dropout_p,
            window=self.window,
            qk_norm=self.qk_norm,
            use_bias=self.qkv_bias,
            use_out_bias=self.out_bias,
            eps=eps,
            implementation=implementation,
            dtype=dtype,
            key=key,
        )
        if self.num_experts is None or self.top_k is None:
            feed_forward = SwiGLU(d_model, self.d_ff, self.mlp_bias, dtype, key=key)
        else:
            sizes = (self.num_experts, self.top_k, self.d_ff)
            feed_forward = MoE(d_model, *sizes, dtype=dtype, key=key)
        block = TransformerBlock(mixer, feed_forward, d_model, eps=eps, dtype=dtype)
        return eqx.nn.inference_mode(block) if self.dropout_p > 0 else block


def _attention_problems(mixer: Any) -> Iterator[str]:
    if type(mixer) is not Attention:
        yield f"the mixer is {type(mixer).__name__}, not Attention"
        return
    if not mixer.rope_enabled:
        yield "attention has no rotary positions (`rope_enabled`)"
    if not mixer.is_causal:
        yield "attention is not causal (`is_causal`)"
    if not isinstance(mixer.dropout.p, int | float):
        yield "the dropout of attention is no plain number"


def _fed_problems(feed_forward: Any) -> Iterator[str]:
    if type(feed_forward) not in (SwiGLU, GLU, MoE):
        yield f"the feed-forward is {type(feed_forward).__name__}, not SwiGLU or MoE"
        return
    if getattr(feed_forward, "activation", "swiglu") != "swiglu":
        yield f"`activation` {feed_forward.activation!r} of the feed-forward: 'swiglu'"
    if isinstance(feed_forward, MoE):
        yield from _expert_problems(feed_forward)


def _expert_problems(experts: MoE) -> Iterator[str]:
    if experts.score != "softmax":
        yield f"the router's `score` is {experts.score!r}, not 'softmax'"
    if not experts.renormalize:
        yield "the weights of experts are not renormalised (`renormalize`)"
    if experts.capacity_factor is not None:
        yield "experts drop tokens (`capacity_factor`)"
    for name in ("shared", "selection_bias", "gate_bias", "up_bias", "down_bias"):
        if getattr(experts, name) is not None:
            yield f"experts have `{name}`"
