from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from ._architecture import Architecture
from ._config_entries import Entries
from ._hf_names import LLAMA
from ._hf_rope import read_rope, write_rope
from ._structure import Structure
from ._transformer_spec import TransformerSpec


class Variant(NamedTuple):
    """What sets one architecture of the Llama family apart from the others.

    `bias`: on all four maps of attention if `attention_bias` says so, on queries, keys
    and values always, or never. `window`: none, one for all layers, or by
    `layer_types`. `gate`: the `activation` of the feed-forward. `sub_norms`: of what
    enters the last maps of attention and feed-forward. `defaults`: what transformers
    takes for entries that are absent.
    """

    model_type: str
    bias: Literal["optional", "qkv", "none"] = "none"
    mlp_bias: bool = False
    window: Literal["none", "all", "layers"] = "none"
    qk_norm: bool = False
    experts: bool = False
    gate: str = "swiglu"
    sub_norms: bool = False
    any_width: bool = True
    defaults: Mapping[str, Any] = {}


_VARIANTS: Mapping[str, Variant] = {
    "LlamaForCausalLM": Variant(
        "llama", bias="optional", mlp_bias=True, any_width=False
    ),
    "MistralForCausalLM": Variant(
        "mistral",
        window="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Variant(
        "qwen2",
        bias="qkv",
        window="layers",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Variant(
        "qwen3",
        bias="optional",
        window="layers",
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    ),
    "MixtralForCausalLM": Variant(
        "mixtral",
        window="all",
        experts=True,
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "BitNetForCausalLM": Variant(
        "bitnet",
        gate="relu2glu",
        sub_norms=True,
        any_width=False,
        defaults={
            "num_key_value_heads": 5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
    ),
}
# What transformers calls what is on the gate, the usual name first.
_HIDDEN_ACTS = {"swiglu": ("silu", "swish"), "relu2glu": ("relu2",)}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _read(kind: Variant, config: Entries) -> Structure:
    default = kind.defaults.get
    d_model = config.size("hidden_size")
    n_heads = config.size("num_attention_heads")
    n_kv_heads = n_heads
    if not config.has("num_key_value_heads"):
        n_kv_heads = default("num_key_value_heads", n_heads)
    head_dim = max(1, d_model // n_heads)
    if not config.has("head_dim"):
        head_dim = default("head_dim", head_dim)
    bias = kind.bias == "optional" and config.flag("attention_bias", False)
    base, scaling = read_rope(config, default("rope_theta", 10000.0))
    activations = _HIDDEN_ACTS[kind.gate]
    activation = config.get("hidden_act") or activations[0]
    if activation not in activations:
        config.refuse(
            f"`hidden_act` {activation!r} is not supported: the feed-forward of these "
            f"models here is gated by {activations[0]!r}"
        )
    if kind.sub_norms and config.flag("attention_bias", False):
        config.refuse(
            "`attention_bias` true is not supported: the maps of BitNet have no biases"
        )
    block = TransformerSpec(
        d_ff=config.size("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=config.size("num_key_value_heads", n_kv_heads),
        head_dim=config.size("head_dim", head_dim),
        window=None,
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=bias or kind.bias == "qkv",
        out_bias=bias,
        mlp_bias=kind.mlp_bias and config.flag("mlp_bias", False),
        qk_norm=kind.qk_norm,
        gate=kind.gate,
        sub_norms=kind.sub_norms,
        dropout_p=config.number("attention_dropout", 0.0),
        num_experts=config.size("num_local_experts", default("num_local_experts"))
        if kind.experts
        else None,
        top_k=config.size("num_experts_per_tok", default("num_experts_per_tok"))
        if kind.experts
        else None,
    )
    if kind.sub_norms and n_heads * block.head_dim != d_model:
        config.refuse(
            f"`head_dim` {block.head_dim} times {n_heads} heads must be `hidden_size` "
            f"{d_model}, which the norm behind them has"
        )
    windows = _windows(config, kind)
    return Structure(
        vocab_size=config.size("vocab_size"),
        d_model=d_model,
        eps=config.number("rms_norm_eps", default("rms_norm_eps", 1e-6), above=0),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        blocks=tuple(replace(block, window=window) for window in windows),
    )


def _windows(config: Entries, kind: Variant) -> tuple[int | None, ...]:
    layers = config.size("num_hidden_layers")
    default = kind.defaults.get("sliding_window")
    if config.has("sliding_window"):
        default = None
    if kind.window == "none":
        return (None,) * layers
    if kind.window == "all":
        window = config.size("sliding_window", default)
        types = [_FULL if window is None else _SLIDING] * layers
        if (config.get("layer_types") or types) != types:
            config.refuse(
                "`layer_types` differs from layer to layer or from `sliding_window`, "
                f"which {kind.model_type} models do not do: every layer has the window"
            )
        return (window,) * layers
    sliding = config.flag("use_sliding_window", False)
    window = config.size("sliding_window", default) if sliding else None
    types = config.get("layer_types")
    if types is None:
        first = config.number("max_window_layers", 28)
        return tuple(None if i < first else window for i in range(layers))
    if not isinstance(types, Sequence) or len(types) != layers:
        config.refuse(f"`layer_types` must have {layers} entries, got {types!r}")
        return (None,) * layers
    unknown = sorted({str(kind) for kind in types} - {_SLIDING, _FULL})
    if unknown:
        config.refuse(
            f"`layer_types` may hold {_FULL!r} and {_SLIDING!r}, got {unknown}"
        )
    if _SLIDING in types and window is None:
        config.refuse(
            f"`layer_types` has {_SLIDING!r}, for which `use_sliding_window` must be "
            "true and `sliding_window` a number"
        )
    return tuple(window if kind == _SLIDING else None for kind in types)


def _lacking(kind: Variant, structure: Structure) -> list[str]:
    block: Any = structure.blocks[0]
    windows = _windows_of(structure)
    biases = (block.qkv_bias, block.out_bias)
    possible = {
        "none": [(False, False)],
        "qkv": [(True, False)],
        "optional": [(False, False), (True, True)],
    }[kind.bias]
    experts = block.num_experts is not None
    wrong = {
        "it has experts": experts and not kind.experts,
        "it has no experts": kind.experts and not experts,
        "it has `qk_norm`": block.qk_norm and not kind.qk_norm,
        "it has no `qk_norm`": kind.qk_norm and not block.qk_norm,
        f"its feed-forward is gated by {block.gate!r}, not {kind.gate!r}": block.gate
        != kind.gate,
        "it has norms in front of `o_proj` and `down_proj`": block.sub_norms
        and not kind.sub_norms,
        "it has no norms in front of `o_proj` and `down_proj`": kind.sub_norms
        and not block.sub_norms,
        f"its {block.n_heads} heads of {block.head_dim} are not `d_model` "
        f"{structure.d_model} wide": kind.sub_norms
        and block.n_heads * block.head_dim != structure.d_model,
        "its feed-forward has biases": block.mlp_bias and not kind.mlp_bias,
        f"its attention has use_bias={biases[0]} and use_out_bias={biases[1]}, which "
        f"can be {' or '.join(map(str, possible))}": biases not in possible,
        "it has a `window`": set(windows) != {None} and kind.window == "none",
        "its windows differ from layer to layer": kind.window == "all"
        and len(set(windows)) > 1,
        "it has windows of several sizes": kind.window == "layers"
        and len(set(windows) - {None}) > 1,
        f"its `d_model` {structure.d_model} is no multiple of `n_heads` "
        f"{block.n_heads}": not kind.any_width
        and structure.d_model % block.n_heads != 0,
    }
    return [what for what, applies in wrong.items() if applies]


def _write(kind: Variant, structure: Structure) -> dict[str, Any]:
    block: Any = structure.blocks[0]
    entries: dict[str, Any] = {
        "intermediate_size": block.d_ff,
        "num_attention_heads": block.n_heads,
        "num_key_value_heads": block.n_kv_heads,
        "head_dim": block.head_dim,
        "hidden_act": _HIDDEN_ACTS[block.gate][0],
        "rms_norm_eps": float(structure.eps),
        "attention_dropout": float(block.dropout_p),
        **write_rope(block.rope_base, block.rope_scaling),
    }
    if kind.bias == "optional":
        entries["attention_bias"] = block.out_bias
    if kind.mlp_bias:
        entries["mlp_bias"] = block.mlp_bias
    if kind.experts:
        entries["num_local_experts"] = block.num_experts
        entries["num_experts_per_tok"] = block.top_k
    windows = _windows_of(structure)
    window = next((w for w in windows if w is not None), None)
    if kind.window != "none":
        entries["sliding_window"] = window
    if kind.window == "layers":
        entries["use_sliding_window"] = window is not None
        entries["layer_types"] = [_FULL if w is None else _SLIDING for w in windows]
        # What transformers before `layer_types` reads: the first layers see all.
        entries["max_window_layers"] = sum(w is None for w in windows)
    return entries


def _windows_of(structure: Structure) -> list[int | None]:
    blocks: tuple[Any, ...] = structure.blocks
    return [block.window for block in blocks]


LLAMA_ARCHITECTURES: Mapping[str, Architecture] = {
    name: Architecture(
        kind.model_type,
        TransformerSpec,
        partial(_read, kind),
        partial(_write, kind),
        LLAMA,
        partial(_lacking, kind),
    )
    for name, kind in _VARIANTS.items()
}
