"""Models that do not fit into a checkpoint: one error names everything."""

import importlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.layers import (
    GLU,
    Attention,
    Conv1DBlock,
    GatedRMSNorm,
    Linear,
    LinearScaling,
    Mamba,
    MoE,
    RMSNorm,
    TokenEmbedding,
)
from capibara_eqx.models import (
    ResidualBlock,
    TransformerBlock,
    mamba2_language_model,
    mamba_language_model,
    transformer_language_model,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
# A block that is none of ours, whatever it does.
Relabelled: Any = type("Relabelled", (ResidualBlock,), {})


def model(**options: Any) -> Any:
    arguments: dict[str, Any] = {"n_kv_heads": 1, "d_ff": 6} | options
    return transformer_language_model(11, 8, 2, 2, **arguments, key=KEY)


def blocks(make) -> Any:
    """A model with `make(block)` in the place of its last block."""
    whole = model()
    changed = (whole.stack.blocks[0], make(whole.stack.blocks[1]))
    return eqx.tree_at(lambda m: m.stack.blocks, whole, changed)


def with_part(name: str, part: Any) -> Any:
    return blocks(lambda block: eqx.tree_at(lambda b: getattr(b, name), block, part))


def moe(**options: Any) -> Any:
    return with_part("feed_forward", MoE(8, 2, 1, 6, **options, key=KEY))


def attention(**options: Any) -> Any:
    arguments: dict[str, Any] = {"n_kv_heads": 1, "rope_enabled": True} | options
    return with_part("mixer", Attention(8, 2, **arguments, key=KEY))


def mamba(where: Any = None, value: Any = None) -> Any:
    """A model of Mamba blocks with `value` in the place of a part."""
    whole = mamba_language_model(11, 8, 2, d_state=2, key=KEY)
    return whole if where is None else eqx.tree_at(where, whole, value)


def mamba2(**options: Any) -> Any:
    arguments: dict[str, Any] = {"d_state": 2, "head_dim": 4, "n_groups": 2} | options
    return mamba2_language_model(11, 8, 2, **arguments, key=KEY)


def conv(**options: Any) -> Any:
    block = Conv1DBlock(16, 16, 4, groups=16, **options, key=KEY)
    return mamba(lambda m: m.stack.blocks[1].mixer.conv, block)


# A model, what the message says.
MODELS: dict[str, tuple[Any, list[str]]] = {
    "residual attention": (
        blocks(lambda b: ResidualBlock(b.mixer, 8)),
        ["block 1: the mixer of the ResidualBlock is Attention, not Mamba"],
    ),
    "no block of ours": (
        blocks(lambda b: Relabelled(b.mixer, 8)),
        ["block 1: Relabelled is neither TransformerBlock nor ResidualBlock"],
    ),
    "no model": (Mamba(8, 2, key=KEY), ["`model`", "LanguageModel", "Mamba"]),
    "a conv of another kind": (
        conv(dilation=2, residual=True, norm="rms"),
        ["3 problems", "block 1: the convolution's `dilation` is 2, not 1", "`norm`"],
    ),
    "no activation": (conv(activation=None), ["block 1", "has no `activation`"]),
    "no conv": (
        mamba(lambda m: m.stack.blocks[0].mixer.conv, Linear(16, 16, key=KEY)),
        ["block 0: the convolution is Linear, not Conv1DBlock"],
    ),
    "mamba sizes": (
        mamba(
            lambda m: m.stack.blocks[1],
            ResidualBlock(Mamba(8, 3, expand=1, key=KEY), 8),
        ),
        ["differ in d_state, expand"],
    ),
    "a map without its bias": (
        mamba(lambda m: m.stack.blocks[1].mixer.dt_proj, Linear(1, 16, False, key=KEY)),
        ["are not: stack.blocks.1.mixer.dt_proj.bias"],
    ),
    "norm before gate": (
        mamba2(norm_before_gate=True),
        ["cannot write this model as Mamba2ForCausalLM", "`norm_before_gate`"],
    ),
    "norm groups": (
        eqx.tree_at(lambda m: m.stack.blocks[1].mixer.norm, mamba2(), GatedRMSNorm(16)),
        ["block 1: the mixer's norm has 1 groups, not 2"],
    ),
    "norm of another kind": (
        eqx.tree_at(lambda m: m.stack.blocks[0].mixer.norm, mamba2(), RMSNorm(16)),
        ["block 0: the mixer's norm is RMSNorm"],
    ),
    "norm eps": (
        mamba2(norm_eps=0.5),
        ["norms have an `eps` of their own: [1e-05, 0.5]"],
    ),
    "both mambas": (
        mamba(lambda m: m.stack.blocks[0], mamba2().stack.blocks[0]),
        ["several kinds: ResidualBlock of Mamba2, ResidualBlock of Mamba"],
    ),
    "kinds": (
        blocks(lambda _: ResidualBlock(Mamba(8, 2, key=KEY), 8)),
        ["of several kinds: TransformerBlock, ResidualBlock of Mamba"],
    ),
    "mixer": (
        blocks(lambda b: TransformerBlock(Mamba(8, 2, key=KEY), b.feed_forward, 8)),
        ["block 1", "Mamba, not Attention"],
    ),
    "decoupled": (
        model(mode="decoupled", sem_dim=4, geo_dim=4, n_kv_heads=None, scan=True),
        ["the scanned block", "DecoupledAttention, not Attention"],
    ),
    "no positions": (model(rope_enabled=False), ["`rope_enabled`", "block 1"]),
    "not causal": (model(is_causal=False), ["`is_causal`"]),
    "geglu": (
        with_part("feed_forward", GLU(8, 6, "geglu", key=KEY)),
        ["block 1: `activation` 'geglu'", "'swiglu'"],
    ),
    "experts": (
        moe(score="sigmoid", renormalize=False, shared_d_ff=6, use_bias=True),
        ["6 problems", "'sigmoid'", "`renormalize`", "`shared`", "`gate_bias`"],
    ),
    "experts that drop": (
        moe(capacity_factor=1.5, use_selection_bias=True),
        ["2 problems", "`capacity_factor`", "`selection_bias`"],
    ),
    "one with experts": (moe(), ["differ in num_experts, top_k"]),
    "rope": (attention(rope_base=7.0), ["differ in rope_base"]),
    "scaling": (
        attention(rope_scaling=LinearScaling(2.0)),
        ["differ in rope_scaling"],
    ),
    "eps": (
        attention(qk_norm=True, eps=0.1),
        ["2 problems", "`eps` of their own: [1e-05, 0.1]", "differ in qk_norm"],
    ),
    "window and bias": (
        model(window=3, use_bias=True),
        ["as LlamaForCausalLM: it has a `window`"],
    ),
    "experts and norm": (
        model(num_experts=2, qk_norm=True),
        ["as Qwen3ForCausalLM: it has experts"],
    ),
    "embedding": (
        eqx.tree_at(lambda m: m.embedding, model(), TokenEmbedding(11, 8, key=KEY)),
        ["TokenEmbedding, not the plain Embedding"],
    ),
    "head": (
        eqx.tree_at(
            lambda m: m.head.bias,
            model(),
            jnp.ones(11),
            is_leaf=lambda leaf: leaf is None,
        ),
        ["also: head.bias"],
    ),
    "shape": (
        eqx.tree_at(lambda m: m.embedding.weight, model(), jnp.ones((12, 8))),
        ["embedding.weight must have shape (11, 8), got (12, 8)"],
    ),
    "not an array": (
        eqx.tree_at(lambda m: m.embedding.weight, model(), {"packed": jnp.ones(3)}),
        ["also: embedding.weight.packed", "not: embedding.weight.", "dequantize"],
    ),
    "dtype": (
        eqx.tree_at(lambda m: m.norm.weight, model(), jnp.ones(8, jnp.float8_e4m3fn)),
        ["norm.weight (float8_e4m3fn)", "bfloat16"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_have_no_place(name, tmp_path):
    built, words = MODELS[name]
    with refused("save_hf", *words):
        save_hf(built, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_architecture_that_was_named(tmp_path):
    with refused("`architecture`", "'LamaForCausalLM'", "mean 'LlamaForCausalLM'"):
        save_hf(model(), tmp_path, architecture="LamaForCausalLM")
    with refused(
        "as LlamaForCausalLM", "3 problems", "`window`", "`qk_norm`", "expert"
    ):
        save_hf(
            model(window=3, qk_norm=True, num_experts=2),
            tmp_path,
            architecture="LlamaForCausalLM",
        )
    with refused("as Qwen2ForCausalLM", "use_bias=False", "can be (True, False)"):
        save_hf(model(), tmp_path, architecture="Qwen2ForCausalLM")
    with refused(
        "as MambaForCausalLM: its blocks are TransformerBlock, not ResidualBlock of Ma"
    ):
        save_hf(model(), tmp_path, architecture="MambaForCausalLM")
    with refused("as LlamaForCausalLM: its blocks are ResidualBlock of Mamba"):
        save_hf(mamba(), tmp_path, architecture="LlamaForCausalLM")
    save_hf(model(), tmp_path, architecture="MistralForCausalLM")
    assert load_hf(tmp_path).stack.num_blocks == 2


def test_a_config_that_contradicts_the_model(tmp_path):
    with refused("2 problems", "`d_ff` 7", "has 6", "`eps` 0.5"):
        save_hf(model(), tmp_path, config={"intermediate_size": 7, "rms_norm_eps": 0.5})
    with refused("`config` says MistralForCausalLM", "`architecture`"):
        save_hf(model(), tmp_path, config={"architectures": ["MistralForCausalLM"]})
    with refused("`config` says LlamaForCausalLM", "written as MambaForCausalLM"):
        save_hf(mamba(), tmp_path, config={"architectures": ["LlamaForCausalLM"]})
    with refused("2 problems", "`d_state` 3, the model has 2", "`n_layers` 4"):
        save_hf(mamba(), tmp_path, config={"state_size": 3, "num_hidden_layers": 4})
    with refused("`config`", "'gelu'"):
        save_hf(model(), tmp_path, config={"hidden_act": "gelu"})


@pytest.mark.parametrize("size", [0, -1, True, 2.5, "5 apples", "GB", "0MB", "-1GB"])
def test_sizes_of_shards(size, tmp_path):
    with refused("`max_shard_size`", repr(size), "5GB"):
        save_hf(model(), tmp_path, max_shard_size=size)


def test_without_the_extra(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    words = "capibara_eqx.interop needs safetensors.*capibara-eqx.interop."
    with pytest.raises(ImportError, match=words):
        save_hf(model(), tmp_path)
    with pytest.raises(ImportError, match=words):
        load_hf(tmp_path)
