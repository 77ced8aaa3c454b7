"""Bad arguments of adapters: the message names the weight and says what to do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.layers import Linear, LoRALinear, MoE
from capibara_eqx.transforms import (
    Affine,
    LoRA,
    Rule,
    attention_rules,
    lora,
    merge,
    quantize,
    trainable_spec,
    unmerge,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def plain() -> Any:
    return {"head": Linear(7, 3, key=KEY)}


@pytest.fixture(scope="module")
def adapted(plain) -> Any:
    rules = [Rule(".*weight", LoRA(2, dropout=0.5))]
    return lora(plain, rules, key=KEY)[0]


def test_bad_specs():
    anything: Any = "8"
    with refused("`rank`", "positive integer", "0"):
        LoRA(0)
    with refused("`rank`", "'8'"):
        LoRA(anything)
    with refused("`alpha`", "positive", "-1"):
        LoRA(2, alpha=-1)
    with refused("`dropout`", "below 1", "1"):
        LoRA(2, dropout=1)
    with refused("`dora`", "True or False"):
        LoRA(2, dora=anything)
    with refused("`dtype`", "floating point", "int8", "quantize"):
        LoRA(2, dtype=jnp.int8)


def test_a_rank_above_that_of_the_weight(plain):
    with refused("lora", "'head/weight'", "at most 3", "4"):
        lora(plain, [Rule(".*weight", LoRA(4))], key=KEY)
    with refused("`rank`", "at most 3"):
        LoRALinear(7, 3, 4, key=KEY)


def test_rules_that_do_not_fit(plain, adapted):
    with refused("lora", "LoRA or None", "Affine"):
        lora(plain, [Rule(".*weight", Affine(4))], key=KEY)
    with refused("lora", "matches no weight", "'head/weight'"):
        lora(plain, [Rule("tail/weight", LoRA(2))], key=KEY)
    with refused("'head/weight'", "adapter already", "LoRA r2", "`merge`"):
        lora(adapted, [Rule(".*weight", LoRA(3))], key=KEY)
    with refused("quantize", "an Affine", "LoRA"):
        quantize(plain, [Rule(".*weight", LoRA(2))])


def test_dropout_where_nothing_multiplies_by_the_weight():
    rules = [Rule("gate|weight", LoRA(1, dropout=0.1))]
    with refused("`dropout`", "'gate'", "MoE", "dropout=0"):
        lora(MoE(4, 3, 2, 5, key=KEY), rules, key=KEY)
    with refused("`dropout`", "'weight'", "Conv1d"):
        lora(eqx.nn.Conv1d(2, 4, 3, key=KEY), rules[:1], key=KEY)


def test_active_dropout_without_a_key(adapted):
    with refused("with_dropout_key(model, key)", "inference_mode"):
        adapted["head"](jnp.ones(7))
    layer = LoRALinear(7, 3, 2, dropout=0.5, key=KEY)
    with refused("LoRALinear", "`key`", "inference_mode"):
        layer(jnp.ones(7))
    assert eqx.nn.inference_mode(layer)(jnp.ones(7)).shape == (3,)


def test_targets_of_attention():
    unknown: Any = ["x"]
    with refused("`targets`", "'q'", "none"):
        attention_rules(LoRA(2), "")
    with refused("`targets`", "'x'"):
        attention_rules(LoRA(2), unknown)


def test_what_has_no_adapter(plain, adapted):
    with refused("merge", "no adapter", "`dequantize`"):
        merge(plain)
    with refused("unmerge", "no adapter"):
        unmerge(plain, plain)
    with refused("unmerge", "(3, 7)", "'head/weight'", "nothing"):
        unmerge({"tail": plain["head"]}, adapted)
    with refused("unmerge", "(3, 7)", "(3, 5)"):
        unmerge({"head": Linear(5, 3, key=KEY)}, adapted)
    with refused("unmerge", "with an adapter", "merge(adapted)"):
        unmerge(adapted, adapted)


def test_what_else_cannot_learn(plain, adapted):
    with refused("`also`", "list of patterns"):
        trainable_spec(adapted, ".*bias")
    with refused("`also`", "all of it learns"):
        trainable_spec(plain, [".*bias"])
    with refused("trainable_spec", "matches no weight"):
        trainable_spec(adapted, ["tail/.*"])
    small, _ = quantize(adapted, [Rule("head/weight", Affine(4))])
    with refused("'head/weight'", "kept as codes", "`dequantize`"):
        trainable_spec(small, [".*weight"])


def test_a_wrong_width():
    layer = LoRALinear(7, 3, 2, key=KEY)
    with refused("LoRALinear", "`x`", "7"):
        layer(jnp.ones((2, 5)))
