"""BitNet of transformers: its models read here, its layers against ours."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.numpy_oracles import wide
from support.tolerances import assert_close

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.layers import BitNet158, BitNetQuantizer


pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
pytest.importorskip("accelerate", reason="transformers loads BitNet with it")
bitnet = pytest.importorskip("transformers.integrations.bitnet")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENS = np.random.default_rng(3).integers(0, 61, (2, 12))
# Float32, logits of size about 3, sums of up to 64 terms through two layers.
ATOL = 2e-5
# An activation at the border of two codes may get either: the token's step, 1/127 of
# its largest value, in one of 32 terms, so 1/127 * 3 / sqrt(32) of an output, here and
# there.
OF_A_CODE = 0.02


@pytest.fixture(autouse=True)
def uncompiled():
    """Its functions are under `torch.compile`, which takes long, and a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def their_model(name: str) -> Any:
    """A tiny float model with random parameters, none of them zero or one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if "norm" in key else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    return model


def write(folder: Path, name: str, linear_class: str, mode: str) -> Any:
    """The model with ternary weights, packed by transformers; as it reads it again."""
    model = their_model(name)
    tensors = {}
    for key, value in model.state_dict().items():
        if "_proj" not in key or mode == "online":
            tensors[key] = value.clone()
            continue
        gamma = value.abs().mean()
        codes = (value / gamma).round().clamp(-1, 1)
        # It changes its argument.
        tensors[key] = bitnet.pack_weights(codes.clone())
        scale = 1 / gamma if linear_class == "bitlinear" else gamma
        tensors[f"{key}_scale"] = scale.reshape(1)
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    quantization["quantization_mode"] = mode
    model.config.architectures = [f"{name}ForCausalLM"]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(folder: Path) -> np.ndarray:
    model = load_hf(folder, scan=True)
    return np.asarray(eqx.filter_jit(model)(jnp.asarray(TOKENS, "int32")))


@pytest.mark.parametrize("name", ["BitNet", "Llama"])
@pytest.mark.parametrize(
    ("linear_class", "mode"),
    [
        ("bitlinear", "offline"),
        ("autobitlinear", "offline"),
        ("autobitlinear", "online"),
    ],
)
def test_ternary_models(name, linear_class, mode, tmp_path):
    """Microsoft/BitNet#616: one divides by what the other multiplies with."""
    theirs = write(tmp_path, name, linear_class, mode)
    layer = theirs.model.layers[0].mlp.down_proj
    kinds = {"bitlinear": bitnet.BitLinear, "autobitlinear": bitnet.AutoBitLinear}
    assert type(layer) is kinds[linear_class]
    expected = their_logits(theirs)
    found = our_logits(tmp_path)
    size = np.max(np.abs(expected))
    assert size > 1
    errors = np.abs(found - expected)
    assert np.median(errors) <= ATOL
    assert np.max(errors) <= OF_A_CODE * size
    # The rounding of activations is more than that: float products would not pass.
    plain = their_logits(without_rounding(theirs))
    assert np.median(np.abs(plain - expected)) > 100 * ATOL


def without_rounding(model: Any) -> Any:
    """The model with plain linear maps of the same matrices."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, bitnet.BitLinear | bitnet.AutoBitLinear):
            continue
        weight = layer.weight.detach()
        if isinstance(layer, bitnet.BitLinear):
            weight = bitnet.unpack_weights(weight, torch.float32) / layer.weight_scale
        elif layer.online_quant:
            weight = bitnet.WeightQuant.apply(weight)
        else:
            weight = weight * layer.weight_scale
        plain = torch.nn.Linear(*weight.shape[::-1], bias=False)
        plain.weight = torch.nn.Parameter(weight)
        model.set_submodule(name, plain)
    return model


def test_a_float_model_there_and_back(tmp_path):
    theirs = their_model("BitNet")
    theirs.save_pretrained(tmp_path)
    expected = their_logits(theirs)
    np.testing.assert_allclose(our_logits(tmp_path), expected, atol=ATOL, rtol=0)
    save_hf(load_hf(tmp_path, scan=True), tmp_path / "again")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(info.values()), info
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_ternary_weights_as_floats(tmp_path):
    """-1, 0 and 1 that are not packed, which `AutoBitLinear` takes as well."""
    theirs = write(tmp_path, "BitNet", "autobitlinear", "offline")
    packed = load_hf(tmp_path)
    tensors = theirs.state_dict()
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(dict(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(their_logits(again), their_logits(theirs))
    plain = load_hf(tmp_path)
    assert jax.tree.structure(packed) == jax.tree.structure(plain)
    for left, right in zip(
        jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_the_layer_and_its_gradients():
    """`AutoBitLinear` with the norm of Llama in front, which is the whole layer."""
    torch.manual_seed(0)
    theirs = bitnet.AutoBitLinear(
        13, 7, bias=False, online_quant=True, use_rms_norm=True, rms_norm_eps=1e-5
    )
    x = torch.randn(5, 13, requires_grad=True)
    with torch.no_grad():
        theirs.rms_norm.weight.copy_(1 + 0.3 * torch.randn(13))
    g = torch.randn(5, 7)
    y = theirs(x)
    y.backward(g)
    layer = BitNet158(13, 7, key=jax.random.key(0))
    own = (jnp.asarray(theirs.rms_norm.weight.detach().numpy()), theirs.weight)

    def function(norm, weight, x):
        new = eqx.tree_at(
            lambda m: (m.norm.weight, m.weight.weight), layer, (norm, weight)
        )
        return new(x)

    arguments = (own[0], jnp.asarray(own[1].detach().numpy()))
    found, back = jax.vjp(function, *arguments, jnp.asarray(x.detach().numpy()))
    gradients = back(jnp.asarray(g.numpy()))
    assert_close(found, y.detach().numpy(), dtype="float32", length=13)
    expected = (theirs.rms_norm.weight.grad, theirs.weight.grad, x.grad)
    for got, want in zip(gradients, expected, strict=True):
        assert_close(got, want.numpy(), dtype="float32", length=26)


def test_tokens_are_rounded_as_there():
    x = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    want = bitnet.ActQuant.apply(x).numpy()
    assert_close(BitNetQuantizer()(jnp.asarray(x.numpy())), wide(want), dtype="float32")
