from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..internal import nearest
from ._config_entries import Entries
from ._decoder import Decoder
from ._hf_rope import read_rope, write_rope


class Architecture(NamedTuple):
    """What sets one architecture of transformers apart from the others.

    `bias`: on all four maps of attention if `attention_bias` says so, on queries, keys
    and values always, or never. `window`: none, one for all layers, or by
    `layer_types`. `defaults`: what transformers takes for entries that are absent.
    """

    model_type: str
    bias: Literal["optional", "qkv", "none"] = "none"
    mlp_bias: bool = False
    window: Literal["none", "all", "layers"] = "none"
    qk_norm: bool = False
    experts: bool = False
    any_width: bool = True
    defaults: Mapping[str, Any] = {}


# In the order in which one is chosen for a model.
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", bias="optional", mlp_bias=True, any_width=False
    ),
    "MistralForCausalLM": Architecture(
        "mistral",
        window="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        bias="qkv",
        window="layers",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        bias="optional",
        window="layers",
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    ),
    "MixtralForCausalLM": Architecture(
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
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


class Config(NamedTuple):
    """A config.json as read; both are `None` if it has problems."""

    architecture: str | None
    decoder: Decoder | None
    problems: list[str]


def read_config(entries: Mapping[str, Any]) -> Config:
    """The structure that a config.json describes, or all that is wrong with it."""
    problems: list[str] = []
    config = Entries(entries, problems, "config.json")
    name = _architecture(config)
    # What is common to all is read for an unknown architecture too.
    kind = ARCHITECTURES[name or "LlamaForCausalLM"]
    decoder = _decoder(config, kind)
    return Config(None, None, problems) if problems else Config(name, decoder, problems)


def _architecture(config: Entries) -> str | None:
    named = config.get("architectures")
    if named:
        name = named[0] if isinstance(named, Sequence) else named
        if name in ARCHITECTURES:
            return name
        known = ", ".join(ARCHITECTURES)
        hint = nearest(name, ARCHITECTURES)
        config.refuse(f"the architecture {name!r} is not one of {known}.{hint}")
        return None
    model_type = config.get("model_type")
    types = {kind.model_type: name for name, kind in ARCHITECTURES.items()}
    if model_type in types:
        return types[model_type]
    config.refuse(
        "`architectures` is missing, and `model_type` must be one of "
        f"{', '.join(types)}; got {model_type!r}.{nearest(model_type, types)}"
    )
    return None


def _decoder(config: Entries, kind: Architecture) -> Decoder:
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
    _refuse_unsupported(config)
    return Decoder(
        vocab_size=config.size("vocab_size"),
        d_model=d_model,
        d_ff=config.size("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=config.size("num_key_value_heads", n_kv_heads),
        head_dim=config.size("head_dim", head_dim),
        windows=_windows(config, kind),
        eps=config.number("rms_norm_eps", default("rms_norm_eps", 1e-6), above=0),
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=bias or kind.bias == "qkv",
        out_bias=bias,
        mlp_bias=kind.mlp_bias and config.flag("mlp_bias", False),
        qk_norm=kind.qk_norm,
        dropout_p=config.number("attention_dropout", 0.0),
        num_experts=config.size("num_local_experts", default("num_local_experts"))
        if kind.experts
        else None,
        top_k=config.size("num_experts_per_tok", default("num_experts_per_tok"))
        if kind.experts
        else None,
    )


def _refuse_unsupported(config: Entries) -> None:
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        config.refuse(
            f"`hidden_act` {activation!r} is not supported: the feed-forward of these "
            "models here is gated by 'silu'"
        )
    if config.get("quantization_config") is not None:
        config.refuse(
            "`quantization_config`: the weights are quantized. Dequantize them with "
            "transformers and save the model again"
        )


def _windows(config: Entries, kind: Architecture) -> tuple[int | None, ...]:
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


def inexpressible(decoder: Decoder, name: str) -> list[str]:
    """What a model has, or lacks, that the architecture `name` has no entry for."""
    kind = ARCHITECTURES[name]
    windows = set(decoder.windows)
    biases = (decoder.qkv_bias, decoder.out_bias)
    possible = {
        "none": [(False, False)],
        "qkv": [(True, False)],
        "optional": [(False, False), (True, True)],
    }[kind.bias]
    experts = decoder.num_experts is not None
    wrong = {
        "it has experts": experts and not kind.experts,
        "it has no experts": kind.experts and not experts,
        "it has `qk_norm`": decoder.qk_norm and not kind.qk_norm,
        "it has no `qk_norm`": kind.qk_norm and not decoder.qk_norm,
        "its feed-forward has biases": decoder.mlp_bias and not kind.mlp_bias,
        f"its attention has use_bias={biases[0]} and use_out_bias={biases[1]}, which "
        f"can be {' or '.join(map(str, possible))}": biases not in possible,
        "it has a `window`": windows != {None} and kind.window == "none",
        "its windows differ from layer to layer": kind.window == "all"
        and len(windows) > 1,
        "it has windows of several sizes": kind.window == "layers"
        and len(windows - {None}) > 1,
        f"its `d_model` {decoder.d_model} is no multiple of `n_heads` "
        f"{decoder.n_heads}": not kind.any_width
        and decoder.d_model % decoder.n_heads != 0,
    }
    return [what for what, applies in wrong.items() if applies]


def write_config(decoder: Decoder, name: str) -> dict[str, Any]:
    """The entries of a config.json that says all of `decoder`.

    No token id ends a text: that is not known here, and transformers would take 2.
    """
    kind = ARCHITECTURES[name]
    entries: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind.model_type,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.d_model,
        "intermediate_size": decoder.d_ff,
        "num_hidden_layers": len(decoder.windows),
        "num_attention_heads": decoder.n_heads,
        "num_key_value_heads": decoder.n_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(decoder.eps),
        "attention_dropout": float(decoder.dropout_p),
        "tie_word_embeddings": decoder.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **write_rope(decoder.rope_base, decoder.rope_scaling),
    }
    if kind.bias == "optional":
        entries["attention_bias"] = decoder.out_bias
    if kind.mlp_bias:
        entries["mlp_bias"] = decoder.mlp_bias
    if kind.experts:
        entries["num_local_experts"] = decoder.num_experts
        entries["num_experts_per_tok"] = decoder.top_k
    window = next((w for w in decoder.windows if w is not None), None)
    if kind.window != "none":
        entries["sliding_window"] = window
    if kind.window == "layers":
        entries["use_sliding_window"] = window is not None
        entries["layer_types"] = [
            _FULL if w is None else _SLIDING for w in decoder.windows
        ]
        # What transformers before `layer_types` reads: the first layers see all.
        entries["max_window_layers"] = sum(w is None for w in decoder.windows)
    return entries
