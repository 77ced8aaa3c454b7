"""Adapters of peft read here, and adapters from here read by peft."""

import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.model_oracle import moved

from capibara_eqx.interop import load_hf, load_peft, save_hf, save_peft
from capibara_eqx.models import LanguageModel
from capibara_eqx.transforms import (
    Affine,
    LoRA,
    Rule,
    attention_rules,
    dequantize,
    lora,
    merge,
    quantize,
    trainable_spec,
)


pytestmark = [
    pytest.mark.slow,
    # Of what peft imports, and of its advice on models without a name.
    pytest.mark.filterwarnings("ignore"),
]

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="needs the extra `peers`")

VOCAB, BATCH, LENGTH = 61, 2, 12
# Float32, logits of size about 3, sums of up to 64 terms through two layers.
ATOL = 2e-5
ATTENTION = ["q_proj", "v_proj"]

# name: (what peft is asked for, scanned here)
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"target_modules": ATTENTION}, True),
    "rslora": ({"target_modules": [*ATTENTION, "down_proj"], "use_rslora": True}, True),
    "dora": ({"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}, True),
    "head-and-embedding": (
        {"target_modules": ["lm_head", "embed_tokens", "o_proj"]},
        False,
    ),
    "patterns": (
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 4},
            "alpha_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 7},
        },
        False,
    ),
    "one-layer": (
        {"target_modules": ATTENTION, "layers_to_transform": [1]},
        False,
    ),
    "rsdora": (
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
        True,
    ),
}


class Pair(NamedTuple):
    """A model with adapters on either side, and the folder of the one without."""

    theirs: Any
    ours: LanguageModel
    base: str
    scan: bool


def base_model(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "Llama":
        sizes |= {"intermediate_size": 48, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2}
    else:
        sizes |= {"state_size": 5}
    if kind == "Mamba2":
        sizes |= {"num_heads": 8, "head_dim": 8, "n_groups": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def adapted(model: Any, **options: Any) -> Any:
    """A model of peft with adapters that are not zero anywhere."""
    config = peft.LoraConfig(r=3, lora_alpha=5, **options)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def make_pair(kind: str, options: dict[str, Any], scan: bool, tmp) -> Pair:
    base, adapter = str(tmp / "base"), str(tmp / "adapter")
    base_model(kind).save_pretrained(base)
    theirs = adapted(base_model(kind), **options)
    theirs.save_pretrained(adapter)
    return Pair(theirs, load_peft(adapter, load_hf(base, scan=scan)), base, scan)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    options, scan = CASES[request.param]
    return make_pair("Llama", options, scan, tmp_path_factory.mktemp(request.param))


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (BATCH, LENGTH))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens())).logits.numpy()


@eqx.filter_jit
def our_logits(model: LanguageModel) -> Any:
    return model(jnp.asarray(tokens(), "int32"))


def assert_equal_logits(ours: Any, theirs: np.ndarray) -> None:
    assert np.max(np.abs(theirs)) > 1  # so that the tolerance means something
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=ATOL, rtol=0)


def test_logits_are_those_of_peft(pair):
    theirs = their_logits(pair.theirs)
    assert_equal_logits(our_logits(pair.ours), theirs)
    with pair.theirs.disable_adapter():
        without = their_logits(pair.theirs)
    assert np.max(np.abs(theirs - without)) > 0.1


def test_what_is_saved_here_loads_in_peft(pair, tmp_path):
    mask = trainable_spec(pair.ours)
    learns, rest = eqx.partition(pair.ours, mask)
    changed = eqx.combine(moved(learns, 1), rest)
    save_peft(changed, tmp_path)
    base = base_model("Llama")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_equal_logits(our_logits(changed), their_logits(theirs))
    again = load_peft(tmp_path, load_hf(pair.base, scan=pair.scan))
    assert eqx.tree_equal(again, changed)


def test_merged_weights_are_those_of_peft(pair):
    merged = merge(pair.ours)
    theirs = pair.theirs.merge_and_unload()
    assert_equal_logits(our_logits(merged), their_logits(theirs))
    state = theirs.state_dict()
    for i in range(2):
        key = f"model.layers.{i}.self_attn.q_proj.weight"
        blocks = merged.stack.blocks
        mixer = blocks.mixer if pair.scan else blocks[i].mixer
        ours = mixer.q_proj.weight[i] if pair.scan else mixer.q_proj.weight
        np.testing.assert_allclose(ours, state[key].numpy(), atol=1e-6, rtol=0)


MAMBA = {"Mamba": ["in_proj", "x_proj", "embeddings"], "Mamba2": ["in_proj"]}


@pytest.mark.parametrize("kind", MAMBA)
def test_mamba_too(kind, tmp_path):
    targets = {"target_modules": MAMBA[kind]}
    pair = make_pair(kind, targets, True, tmp_path)
    assert_equal_logits(our_logits(pair.ours), their_logits(pair.theirs))
    save_peft(pair.ours, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(base_model(kind), tmp_path / "again").eval()
    assert_equal_logits(our_logits(pair.ours), their_logits(theirs))


def test_an_adapter_made_here_loads_in_peft(tmp_path):
    """Of two ranks, on a compressed model; theirs is the same model, rounded."""
    save_base = base_model("Llama")
    save_base.save_pretrained(tmp_path / "base")
    ours = load_hf(tmp_path / "base")
    small, _ = quantize(ours, [Rule(r"stack/.*_proj/weight", Affine(4))])
    save_hf(dequantize(small), tmp_path / "rounded")
    rules = [Rule(r".*/1/.*v_proj/weight", LoRA(5, alpha=2.5))]
    rules += attention_rules(LoRA(2), "qv")
    adapted, _ = lora(small, rules, key=jax.random.key(1))
    learns, rest = eqx.partition(adapted, trainable_spec(adapted))
    adapted = eqx.combine(moved(learns, 2), rest)
    save_peft(adapted, tmp_path / "adapter", config={"revision": "main"})
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    theirs = peft.PeftModel.from_pretrained(rounded, tmp_path / "adapter").eval()
    assert_equal_logits(our_logits(adapted), their_logits(theirs))
