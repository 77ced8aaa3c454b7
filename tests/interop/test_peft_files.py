"""Folders of adapters, without peft: a round trip, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.lora_oracle import moved_adapters
from support.messages import refused
from support.quick import filled

from capibara_eqx.interop import load_peft, save_peft
from capibara_eqx.models import mamba_language_model, transformer_language_model
from capibara_eqx.transforms import Affine, LoRA, Rule, attention_rules, lora, quantize


KEY = jax.random.key(0)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def model(**options: Any) -> Any:
    arguments: dict[str, Any] = {"n_kv_heads": 1, "d_ff": 6} | options
    make = transformer_language_model
    made = filled(make, 11, 8, 2, 2, **arguments, seed=0, size=0.5)
    return eqx.nn.inference_mode(made)


def with_adapters(plain: Any, *rules: Rule) -> Any:
    """Adapters as `load_peft` reads them: with dropout off."""
    made, _ = lora(plain, rules or attention_rules(LoRA(2, alpha=3)), key=KEY)
    return eqx.nn.inference_mode(moved_adapters(made, 1))


@pytest.fixture
def folder(tmp_path) -> Path:
    save_peft(with_adapters(model()), tmp_path)
    return tmp_path


def change(folder: Path, **entries: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("scan", [False, True])
def test_a_round_trip(scan, tmp_path):
    plain = model(scan=scan)
    made = with_adapters(
        plain, Rule(".*v_proj/weight", LoRA(1, dora=True, dropout=0.1))
    )
    save_peft(made, tmp_path, config={"base_model_name_or_path": "some/model"})
    assert eqx.tree_equal(load_peft(tmp_path, plain), made)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 6
    blocks = made.stack.blocks
    a = blocks.mixer.v_proj.weight.a[1] if scan else blocks[1].mixer.v_proj.weight.a
    np.testing.assert_array_equal(tensors[PREFIX.format(1, "v_proj", "A")], a)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["v_proj"]
    assert config["use_dora"]
    assert config["lora_dropout"] == 0.1
    assert config["base_model_name_or_path"] == "some/model"


@pytest.mark.slow
def test_adapters_over_codes_in_bfloat16(tmp_path):
    plain, _ = quantize(model(), [Rule("stack/.*q_proj/weight", Affine(4))])
    rule = Rule(".*/0/.*q_proj/weight", LoRA(2, dtype=jnp.bfloat16))
    made = with_adapters(plain, rule)
    save_peft(made, tmp_path)
    assert eqx.tree_equal(load_peft(tmp_path, plain), made)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.errors
def test_models_without_a_place(tmp_path, folder):
    with refused("save_peft", "has none", "transforms.lora"):
        save_peft(model(), tmp_path)
    tied = with_adapters(model(tie_embeddings=True), Rule("embedding/.*", LoRA(1)))
    with refused("save_peft", "embedding is the head"):
        save_peft(tied, tmp_path)
    rules = [Rule(".*q_proj/weight", LoRA(1, rs=True)), *attention_rules(LoRA(1), "v")]
    with refused("save_peft", "differ in `rs`"):
        save_peft(with_adapters(model(), *rules), tmp_path)
    experts = with_adapters(
        model(num_experts=2, top_k=1), Rule(".*feed_forward/up", LoRA(1))
    )
    with refused("save_peft", "feed_forward/up", "`merge`"):
        save_peft(experts, tmp_path)
    mamba = filled(mamba_language_model, 11, 8, 1, d_state=2, seed=0, size=0.5)
    mamba = with_adapters(mamba, Rule(".*out_proj/weight", LoRA(1)))
    with refused("save_peft", "out_proj/weight"):
        save_peft(mamba, tmp_path)
    with refused("save_peft", "`config`", "`r` 7", "has 2"):
        save_peft(with_adapters(model()), tmp_path, config={"r": 7})
    with refused("load_peft", "adapters already", "`merge`"):
        load_peft(folder, with_adapters(model()))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"peft_type": "LOHA"}, ("`peft_type`", "'LOHA'")),
        ({"bias": "all"}, ("`bias`", "'none'")),
        ({"modules_to_save": ["lm_head"]}, ("`modules_to_save`", "lm_head")),
        ({"init_lora_weights": "pissa"}, ("`init_lora_weights`", "pissa")),
        ({"lora_bias": True}, ("`lora_bias`", "not supported")),
        ({"rank_pattern": {"(": 2}}, ("`rank_pattern`", "regular expression")),
        ({"r": 3}, ("q_proj.lora_A.weight", "(3, 8)", "(2, 8)")),
        ({"lora_alpha": -1}, ("`lora_alpha`", "above 0")),
        ({"use_dora": True}, ("q_proj", "no magnitude")),
    ],
)
def test_entries_that_do_not_fit(folder, entries, words):
    change(folder, **entries)
    with refused("load_peft", str(folder), *words):
        load_peft(folder, model())


@pytest.mark.errors
def test_files_that_do_not_fit(folder):
    with refused("`path`", "not there"):
        load_peft(folder / "absent", model())
    tensors = load_file(folder / WEIGHTS)
    with refused("cannot be scanned", "scan=False"):
        lonely = {k: v for k, v in tensors.items() if ".0." in k}
        save_file(lonely, folder / WEIGHTS)
        load_peft(folder, model(scan=True))
    odd = tensors | {"base_model.model.tail.lora_A.weight": np.ones((2, 8), "float32")}
    save_file(odd | {"other": np.ones(2, "float32")}, folder / WEIGHTS)
    with refused("no part of an adapter: other", "does not have", "tail"):
        load_peft(folder, model())
    tensors.pop(PREFIX.format(0, "q_proj", "B"))
    save_file(tensors, folder / WEIGHTS)
    with refused("model.layers.0.self_attn.q_proj", "no b"):
        load_peft(folder, model())
    head = {"base_model.model.lm_head.weight": np.ones((11, 8), "float32")}
    save_file(head, folder / WEIGHTS)
    with refused("lm_head.weight", "trained or resized"):
        load_peft(folder, model())
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").touch()
    with refused(f"{WEIGHTS} is missing", "save it with peft"):
        load_peft(folder, model())
    (folder / CONFIG).unlink()
    with refused(f"{CONFIG} is missing"):
        load_peft(folder, model())
