from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import DTypeLike, PRNGKeyArray

from ..layers import (
    GLU,
    Attention,
    BitNet158,
    GatedRMSNorm,
    Linear,
    MoE,
    RMSNorm,
    RopeScaling,
    SwiGLU,
)
from ..models import TransformerBlock
from ._hf_rope import without_ntk
from ._structure import BlockSpec


_GATES = ("swiglu", "relu2glu")


@dataclass(frozen=True)
class TransformerSpec(BlockSpec):
    """A block of the Llama family; see `BlockSpec`.

    `sub_norms`: whether the last maps of attention and feed-forward have a norm of
    their own, as in `BitNet158`.
    """

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
    gate: str
    sub_norms: bool
    dropout_p: float
    num_experts: int | None
    top_k: int | None

    kind: ClassVar[str] = "TransformerBlock"
    by_layer: ClassVar[frozenset[str]] = frozenset({"window"})

    @classmethod
    def problems(cls, block: Any) -> list[str]:
        """See `BlockSpec`."""
        problems = [
            *_attention_problems(block.mixer),
            *_fed_problems(block.feed_forward),
        ]
        return problems or list(_map_problems(block))

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
            out_bias=getattr(mixer.o_proj, "bias", None) is not None,
            mlp_bias=not experts and feed_forward.gate_proj.bias is not None,
            qk_norm=mixer.q_norm is not None,
            gate=_gate(feed_forward),
            sub_norms=isinstance(mixer.o_proj, BitNet158),
            dropout_p=float(mixer.dropout.p),
            num_experts=feed_forward.num_experts if experts else None,
            top_k=feed_forward.top_k if experts else None,
        )

    @staticmethod
    def norms(block: Any) -> list[RMSNorm | GatedRMSNorm]:
        """See `BlockSpec`."""
        mixer = block.mixer
        norms = [block.mixer_norm, block.feed_forward_norm, mixer.q_norm, mixer.k_norm]
        if isinstance(mixer.o_proj, BitNet158):
            norms += [mixer.o_proj.norm, block.feed_forward.down_proj.norm]
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
            sizes = (d_model, self.d_ff)
            if self.gate == "swiglu":
                feed_forward = SwiGLU(*sizes, self.mlp_bias, dtype, key=key)
            else:
                feed_forward = GLU(*sizes, self.gate, self.mlp_bias, dtype, key=key)
        else:
            sizes = (self.num_experts, self.top_k, self.d_ff)
            feed_forward = MoE(d_model, *sizes, dtype=dtype, key=key)
        block = TransformerBlock(mixer, feed_forward, d_model, eps=eps, dtype=dtype)
        if self.sub_norms:
            inner = (self.n_heads * self.head_dim, self.d_ff)
            block = eqx.tree_at(
                _last_maps,
                block,
                [
                    BitNet158(n, d_model, False, eps=eps, dtype=dtype, key=key)
                    for n in inner
                ],
            )
        return eqx.nn.inference_mode(block) if self.dropout_p > 0 else block


def _last_maps(block: Any) -> list[Any]:
    return [block.mixer.o_proj, block.feed_forward.down_proj]


def _gate(feed_forward: Any) -> str:
    return getattr(feed_forward, "activation", "swiglu")


def _map_problems(block: Any) -> Iterator[str]:
    """Maps with parameters of their own, but for the norms of BitNet."""
    mixer, fed = block.mixer, block.feed_forward
    maps = {"q_proj": mixer.q_proj, "k_proj": mixer.k_proj, "v_proj": mixer.v_proj}
    last = {"o_proj": mixer.o_proj}
    if not isinstance(fed, MoE):
        maps |= {"gate_proj": fed.gate_proj, "up_proj": fed.up_proj}
        last["down_proj"] = fed.down_proj
    kinds = {type(layer) for layer in last.values()}
    # The norms are in both or in none.
    if kinds != {BitNet158} or len(last) == 1:
        maps |= last
    for name, layer in maps.items():
        if not isinstance(layer, Linear):
            yield f"its `{name}` is {type(layer).__name__}, not Linear"


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
    gate = _gate(feed_forward)
    if gate not in _GATES[: 1 if isinstance(feed_forward, MoE) else None]:
        yield f"`activation` {gate!r} of the feed-forward: 'swiglu'"
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
