"""Checkpoints of BitNet, packed or not, against their logits in float64 NumPy."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.bitnet_checkpoint import KINDS, logits_of, write
from support.numpy_oracles import wide
from support.tolerances import assert_close

from capibara_eqx.arrays import FakeQuantArray, Ternary, TernaryArray
from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.layers import BitNet158
from capibara_eqx.models import model_cost
from capibara_eqx.transforms import convert, dequantize, report


TOKENS = np.array([3, 0, 10, 7, 7, 1, 4])
QUERY = "model.layers.1.self_attn.q_proj.weight"


def loaded(folder: Path, **options: Any) -> Any:
    return load_hf(folder, **options)


@eqx.filter_jit
def run(model):
    return model(jnp.asarray(TOKENS, "int32"))


@eqx.filter_jit
def stream(model):
    cache = model.init_cache(max_len=len(TOKENS))
    first, cache = model.prefill(jnp.asarray(TOKENS[:-1], "int32"), cache)
    last, _ = model.step(jnp.asarray(TOKENS[-1], "int32"), cache)
    return jnp.concatenate([first, last[None]])


def close(got, want):
    """Sums of up to 8 terms through the 14 maps and 9 norms of two layers.

    An activation at the border of two codes could get the other one, which would show
    as a hundredth: of these numbers none lies there.
    """
    assert np.max(np.abs(want)) > 1  # so that the tolerance means something
    assert_close(got, want, dtype="float32", length=8 * 23)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, tmp_path):
    written = write(tmp_path, kind)
    close(run(loaded(tmp_path, scan=True)), logits_of(written, TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_text_that_goes_on(kind, tmp_path):
    written = write(tmp_path, kind)
    close(stream(loaded(tmp_path)), logits_of(written, TOKENS))


@pytest.mark.parametrize("kind", ["divides", "multiplies", "plain"])
def test_what_is_kept(kind, tmp_path):
    """Codes bit by bit, and a scale that multiplies whatever the file has."""
    written = write(tmp_path, kind, np.float16)
    model = loaded(tmp_path)
    block = model.stack.blocks[1]
    names = {
        "mixer.q_proj": "self_attn.q_proj",
        "mixer.k_proj": "self_attn.k_proj",
        "mixer.v_proj": "self_attn.v_proj",
        "mixer.o_proj": "self_attn.o_proj",
        "feed_forward.gate_proj": "mlp.gate_proj",
        "feed_forward.up_proj": "mlp.up_proj",
        "feed_forward.down_proj": "mlp.down_proj",
    }
    for ours, theirs in names.items():
        part, _, layer = ours.partition(".")
        node = getattr(getattr(block, part), layer).weight
        name = f"model.layers.1.{theirs}.weight"
        assert isinstance(node, TernaryArray)
        assert node.spec == Ternary(activations="int8")
        # That of the scale; the scale itself is wide.
        assert node.dtype == jnp.float16
        assert node.scale.dtype == jnp.float32
        np.testing.assert_array_equal(node.ternary, written.codes[name])
        scale = np.max(np.abs(written.dense[name]))
        np.testing.assert_allclose(node.scale, [[scale]], rtol=2**-23)
    assert model.embedding.weight.dtype == jnp.float16
    assert isinstance(block.mixer.o_proj, BitNet158)
    norm = "model.layers.1.mlp.ffn_sub_norm.weight"
    np.testing.assert_array_equal(
        block.feed_forward.down_proj.norm.weight, written.tensors[norm]
    )
    assert loaded(tmp_path, dtype=jnp.bfloat16).head is None


def test_plain_weights_of_any_size(tmp_path):
    """-1, 0 and 1 times a number, as some programs save them: the numbers multiply."""
    written = write(tmp_path, "plain")
    tensors = dict(written.tensors)
    tensors[QUERY] = tensors[QUERY] * np.float32(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    node = loaded(tmp_path).stack.blocks[1].mixer.q_proj.weight
    np.testing.assert_array_equal(node.ternary, written.codes[QUERY])
    want = 0.5 * written.tensors[f"{QUERY}_scale"]
    np.testing.assert_array_equal(node.scale[0], want)


@pytest.mark.slow
def test_weights_that_still_learn(tmp_path):
    written = write(tmp_path, "online")
    model = loaded(tmp_path, scan=True)
    node = model.stack.blocks.mixer.q_proj.weight
    assert isinstance(node, FakeQuantArray)
    np.testing.assert_array_equal(node.weight[1], written.tensors[QUERY])
    gradient = eqx.filter_grad(lambda m: jnp.sum(run(m) ** 2))(model)
    for name in ("q_proj", "o_proj"):
        weight = getattr(gradient.stack.blocks.mixer, name).weight.weight
        assert np.all(np.any(np.asarray(weight) != 0, axis=-1))
    small = convert(model)
    close(run(small), logits_of(written, TOKENS))
    assert {entry.scheme for entry in report(small).entries} == {"ternary a8"}
    assert len(report(small).entries) == 7


def test_a_float_model_is_written_again(tmp_path):
    written = write(tmp_path, "float")
    model = loaded(tmp_path)
    save_hf(model, tmp_path / "again")
    again = loaded(tmp_path / "again")
    np.testing.assert_array_equal(run(again), run(model))
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == written.tensors.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, written.tensors[name])


def test_a_ternary_model_is_written_as_floats(tmp_path):
    """Of the values that it computes with, its inputs no longer rounded."""
    written = write(tmp_path, "divides")
    save_hf(dequantize(loaded(tmp_path)), tmp_path / "again")
    again = loaded(tmp_path / "again")
    close(run(again), logits_of(written._replace(codes={}), TOKENS))
    got = wide(again.stack.blocks[1].mixer.q_proj.weight)
    np.testing.assert_allclose(got, written.dense[QUERY], rtol=2**-22)


def test_the_work_counts_the_norms_inside(tmp_path):
    write(tmp_path, "float")
    _, block, *_ = model_cost(loaded(tmp_path), max_len=5)
    maps = 2 * (2 * 8 * 8 + 2 * 4 * 8 + 3 * 6 * 8)
    norms = 4 * (3 * 8 + 6)
    assert block.flops == maps + norms + 2 * 5 * (4 * 4 + 5)
