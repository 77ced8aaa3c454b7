"""What is written is read again, and what lies on disk is what others expect."""

import contextlib
import functools
import inspect
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.quick import built, filled

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.models import transformer_language_model


VOCAB, D, FF = 11, 8, 6

# architecture: what makes a model one of it
KINDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"n_kv_heads": 1, "use_bias": True},
    "MistralForCausalLM": {"n_kv_heads": 2, "window": 3, "dtype": jnp.float16},
    "Qwen2ForCausalLM": {"use_bias": True, "use_out_bias": False, "window": 4},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 6, "n_kv_heads": 1},
    "MixtralForCausalLM": {"num_experts": 3, "dtype": jnp.bfloat16},
}


@functools.cache
def model(seed: int = 0, **options: Any) -> Any:
    arguments: dict[str, Any] = {"d_ff": FF, "rope_base": 50.0, "eps": 1e-4} | options
    make = functools.partial(transformer_language_model, VOCAB, D, 2, 2, **arguments)
    return filled(make, seed=seed, size=0.4)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def read_json(path):
    return json.loads(path.read_text())


@eqx.filter_jit
def logits_of(model):
    return model(jnp.arange(7, dtype="int32") % VOCAB)


@pytest.mark.parametrize("name", KINDS)
def test_every_architecture(name, tmp_path):
    written = model(**KINDS[name])
    save_hf(written, tmp_path)
    assert read_json(tmp_path / "config.json")["architectures"] == [name]
    assert_same(load_hf(tmp_path), written)
    scanned = load_hf(tmp_path, scan=True, remat="full")
    assert scanned.stack.remat == "full"
    # The same sums in the same order, as loops or unrolled.
    dtype = written.embedding.weight.dtype
    np.testing.assert_allclose(
        logits_of(scanned).astype("float32"),
        logits_of(written).astype("float32"),
        atol=16 * float(jnp.finfo(dtype).eps),
    )
    save_hf(scanned, tmp_path / "scanned")
    assert_same(load_hf(tmp_path / "scanned"), written)


@pytest.mark.parametrize("function", [load_hf, save_hf])
def test_the_example_runs(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(
        r"```python\n(.*?)```", inspect.getdoc(function) or "", re.DOTALL
    )
    quickly = functools.partial(built, transformer_language_model)
    given = {"jnp": jnp, "key": jax.random.key(0)}
    exec(
        textwrap.dedent(example),
        given | {"transformer_language_model": quickly},
    )
    assert (tmp_path / "checkpoint" / "config.json").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_heads(tied, tmp_path):
    written = model(tie_embeddings=tied)
    save_hf(written, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    read = load_hf(tmp_path)
    assert (read.head is None) is tied
    assert_same(read, written)


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    written = model(tie_embeddings=True)
    save_hf(written, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_hf(tmp_path), written)


def test_layers_with_and_without_a_window(tmp_path):
    windowed, whole = model(window=3, qk_norm=True), model(qk_norm=True)
    mixed = eqx.tree_at(lambda m: m.stack.blocks[0], whole, windowed.stack.blocks[0])
    save_hf(mixed, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert_same(load_hf(tmp_path), mixed)


# Names and shapes as transformers writes them: 2 heads of 4, one of keys, width 8.
ATTENTION = {
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.k_proj.weight": (4, 8),
    "self_attn.v_proj.weight": (4, 8),
    "self_attn.o_proj.weight": (8, 8),
}
MLP = {
    "mlp.gate_proj.weight": (6, 8),
    "mlp.up_proj.weight": (6, 8),
    "mlp.down_proj.weight": (8, 6),
}
BIASES = {
    "self_attn.q_proj.bias": (8,),
    "self_attn.k_proj.bias": (4,),
    "self_attn.v_proj.bias": (4,),
}
NORMS = {"self_attn.q_norm.weight": (4,), "self_attn.k_norm.weight": (4,)}
EXPERTS = {"block_sparse_moe.gate.weight": (2, 8)} | {
    f"block_sparse_moe.experts.{j}.{name}.weight": shape
    for j in range(2)
    for name, shape in {"w1": (6, 8), "w2": (8, 6), "w3": (6, 8)}.items()
}
ON_DISK = {
    "Llama": ({}, ATTENTION | MLP),
    "Mistral": ({"window": 2}, ATTENTION | MLP),
    "Qwen2": ({"use_bias": True, "use_out_bias": False}, ATTENTION | BIASES | MLP),
    "Qwen3": ({"qk_norm": True}, ATTENTION | NORMS | MLP),
    "Mixtral": ({"num_experts": 2}, ATTENTION | EXPERTS),
}


@pytest.mark.parametrize("scan", [False, True], ids=["list", "scanned"])
@pytest.mark.parametrize("name", ON_DISK)
def test_names_and_shapes_on_disk(name, scan, tmp_path):
    options, block = ON_DISK[name]
    save_hf(model(n_kv_heads=1, scan=scan, **options), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        assert file.metadata() == {"format": "pt"}
    expected = {
        f"model.layers.{i}.{key}": shape
        for i in range(2)
        for key, shape in block.items()
    }
    expected |= {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    assert found == expected | {"lm_head.weight": (11, 8)}


def test_which_array_lies_where(tmp_path):
    written = model(num_experts=2, scan=True)
    save_hf(written, tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    blocks: Any = written.stack.blocks
    block = "model.layers.1."
    expert = f"{block}block_sparse_moe.experts.0."
    where = {
        "model.embed_tokens.weight": written.embedding.weight,
        "model.norm.weight": written.norm.weight,
        f"{block}input_layernorm.weight": blocks.mixer_norm.weight[1],
        f"{block}post_attention_layernorm.weight": blocks.feed_forward_norm.weight[1],
        f"{block}self_attn.q_proj.weight": blocks.mixer.q_proj.weight[1],
        f"{block}self_attn.k_proj.weight": blocks.mixer.k_proj.weight[1],
        f"{block}self_attn.v_proj.weight": blocks.mixer.v_proj.weight[1],
        f"{block}self_attn.o_proj.weight": blocks.mixer.o_proj.weight[1],
        f"{block}block_sparse_moe.gate.weight": blocks.feed_forward.router.weight[1],
        f"{expert}w1.weight": blocks.feed_forward.gate[1, 0],
        f"{expert}w2.weight": blocks.feed_forward.down[1, 0],
        f"{expert}w3.weight": blocks.feed_forward.up[1, 0],
    }
    for name, array in where.items():
        np.testing.assert_array_equal(disk[name], array, err_msg=name)


def test_entries_of_config_json(tmp_path):
    written = model(num_experts=3, top_k=2, n_kv_heads=1, window=5, dropout_p=0.25)
    save_hf(written, tmp_path, config={"eos_token_id": 7, "anything": [1]})
    expected = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-4,
        "attention_dropout": 0.25,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 7,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "rope_theta": 50.0,
        "rope_scaling": None,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "dtype": "float32",
        "torch_dtype": "float32",
        "anything": [1],
    }
    assert read_json(tmp_path / "config.json") == expected
    # Dropout is off, as after `from_pretrained`.
    read = load_hf(tmp_path)
    assert_same(read, eqx.nn.inference_mode(written))


def test_the_entries_of_another_config_go_through(tmp_path):
    written = model(window=4)
    extra = {"rope_theta": 50, "head_dim": None, "max_position_embeddings": 99}
    save_hf(written, tmp_path, config=extra | {"sliding_window": 4})
    assert read_json(tmp_path / "config.json")["max_position_embeddings"] == 99
    assert_same(load_hf(tmp_path), written)


@pytest.mark.parametrize("where", ["jax", "numpy"])
def test_arrays_that_lie_transposed_in_memory(where, tmp_path):
    written = model()
    weight = np.asarray(written.stack.blocks[0].mixer.k_proj.weight)
    turned = np.asfortranarray(weight)
    assert not turned.flags.c_contiguous
    leaf = turned if where == "numpy" else jnp.asarray(weight.T.copy()).T
    changed = eqx.tree_at(
        lambda m: (m.stack.blocks[0].mixer.k_proj.weight, m.embedding.weight),
        written,
        (leaf, np.asarray(written.embedding.weight)[:, ::-1]),
    )
    save_hf(changed, tmp_path)
    read: Any = load_hf(tmp_path)
    np.testing.assert_array_equal(read.stack.blocks[0].mixer.k_proj.weight, weight)
    table = np.asarray(written.embedding.weight)[:, ::-1]
    np.testing.assert_array_equal(read.embedding.weight, table)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scan", [False, True])
def test_dtypes(dtype, scan, tmp_path):
    written = model(num_experts=2, dtype=jnp.bfloat16)
    save_hf(written, tmp_path)
    assert read_json(tmp_path / "config.json")["torch_dtype"] == "bfloat16"
    read = load_hf(tmp_path, dtype=dtype, scan=scan)
    expected = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if eqx.is_array(leaf) else leaf, written
    )
    save_hf(read, tmp_path)
    assert_same(load_hf(tmp_path), expected)


def test_tensors_keep_dtypes_of_their_own(tmp_path):
    written = model(dtype=jnp.bfloat16)
    norm = written.norm.weight.astype(jnp.float32)
    written = eqx.tree_at(lambda m: m.norm.weight, written, norm)
    save_hf(written, tmp_path)
    assert read_json(tmp_path / "config.json")["dtype"] == "float32"
    assert_same(load_hf(tmp_path), written)


@pytest.mark.parametrize("size", [1, 700, "0.5KB", "1 KiB"])
def test_shards(size, tmp_path):
    written = model(n_kv_heads=1, num_experts=2)
    save_hf(written, tmp_path, max_shard_size=size)
    limit = {1: 1, 700: 700, "0.5KB": 500, "1 KiB": 1024}[size]
    index = read_json(tmp_path / "model.safetensors.index.json")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for name in files:
        tensors = load_file(tmp_path / name)
        assert all(index["weight_map"][key] == name for key in tensors)
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(sizes) <= limit or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert_same(load_hf(tmp_path), written)


def test_a_checkpoint_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    first, second = model(1), model(2)
    save_hf(first, tmp_path, max_shard_size=500)
    save_hf(second, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "config.json", "model.safetensors"}
    assert_same(load_hf(tmp_path), second)
    save_hf(first, tmp_path, max_shard_size=500)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_hf(tmp_path), first)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("sizes", [(None, None), (2000, None), (3000, 2000)])
def test_an_interrupted_write_leaves_no_mixture(sizes, tmp_path, monkeypatch):
    """Whatever call is the last, the folder is the old, the new, or unreadable."""
    first, second = model(1), model(2)
    moves = {"left": 0}

    def until_interrupted(move):
        def moving(*arguments, **options):
            moves["left"] -= 1
            if moves["left"] < 0:
                raise KeyboardInterrupt
            return move(*arguments, **options)

        return moving

    seen = set()
    for calls in range(200):
        folder = tmp_path / str(calls)
        save_hf(first, folder, max_shard_size=sizes[0])
        moves["left"] = calls
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until_interrupted(os.replace))
            patch.setattr(os, "fsync", until_interrupted(os.fsync))
            patch.setattr(Path, "unlink", until_interrupted(Path.unlink))
            finished = False
            with contextlib.suppress(KeyboardInterrupt):
                save_hf(second, folder, max_shard_size=sizes[1])
                finished = True
        if finished:
            break
        try:
            found = load_hf(folder)
        except ValueError as error:
            known = "config.json is missing" in str(error)
            seen.add("unreadable" if known else str(error))
            continue
        assert bool(eqx.tree_equal(found, first))
        seen.add("old")
        assert not list(folder.glob(".saving*"))
    assert seen == {"old", "unreadable"}
    assert_same(load_hf(folder), second)
