"""What transformers takes a config.json for, and what is read from it here."""

import copy
from typing import Any

import jax
import numpy as np
import pytest
from support.quick import built

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.interop._hf_config import read_config
from capibara_eqx.layers import rotary_frequencies
from capibara_eqx.models import mamba2_language_model


pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALES = {"beta_fast": 16.0, "mscale": 0.8, "mscale_all_dim": 0.5}

# Of real models.
SIZES = {"vocab_size": 61, "hidden_size": 512, "num_hidden_layers": 30}
ATTENTION_SIZES = {"intermediate_size": 48, "num_attention_heads": 32}
OWN_SIZES: dict[str, dict[str, Any]] = {"Mamba": {}, "Mamba2": {"expand": 16}}


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Mamba", "Mamba2"]
)
def test_entries_that_are_absent_are_those_of_transformers(name, sliding):
    given = SIZES | OWN_SIZES.get(name, ATTENTION_SIZES)
    given |= {"use_sliding_window": True} if sliding else {}
    whole = getattr(transformers, f"{name}Config")(**given).to_dict()
    read = [
        read_config(entries | {"architectures": [f"{name}ForCausalLM"]})
        for entries in (given, whole)
    ]
    assert read[0].problems == []
    assert read[0].structure == read[1].structure


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_type": "linear", "factor": 4},
    LLAMA3 | {"original_max_position_embeddings": 8192},
    YARN | {"original_max_position_embeddings": 4096},
    YARN | {"attention_factor": 1.5, "beta_slow": 2},
    YARN | {"original_max_position_embeddings": 4096} | SCALES,
    YARN | {"mscale": 0.7, "beta_fast": 20},
    YARN | {"factor": 0.5, "mscale": 0.7, "mscale_all_dim": 0.9},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 2.0},
]


@pytest.mark.parametrize("parameters", ROPES, ids=str)
def test_frequencies_are_those_of_transformers(parameters):
    entries = SIZES | ATTENTION_SIZES
    entries |= {"max_position_embeddings": 65536, "head_dim": 128}
    entries |= {"architectures": ["LlamaForCausalLM"]}
    entries |= {"rope_parameters": {"rope_theta": 500000.0, **parameters}}
    structure = read_config(copy.deepcopy(entries)).structure
    assert structure is not None
    block: Any = structure.blocks[0]
    found, size = rotary_frequencies(128, block.rope_base, block.rope_scaling)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(**entries)
    )
    # Computed in float32 there.
    np.testing.assert_allclose(found, rotary.inv_freq.numpy(), rtol=2e-6)
    np.testing.assert_allclose(size, rotary.attention_scaling, rtol=1e-12)


@pytest.mark.parametrize("limit", [(0.0, np.inf), (0.25, np.inf), (0.25, 0.5)])
def test_limits_of_steps(limit, tmp_path):
    """Infinity is written in one way there and in another here."""
    sizes = {"d_state": 3, "head_dim": 4, "dt_limit": limit}
    make, key = mamba2_language_model, jax.random.key(0)
    ours = built(make, 11, 4, 1, key=key, **sizes)
    save_hf(ours, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert tuple(config.time_step_limit) == limit
    config.save_pretrained(tmp_path)
    read: Any = load_hf(tmp_path)
    assert read.stack.blocks[0].mixer.dt_limit == limit
