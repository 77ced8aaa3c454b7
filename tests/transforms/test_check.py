"""What a damaged file of compressed weights makes of a model is found, and named."""

import functools
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import refused
from support.quick import filled

from capibara_eqx.arrays import LoRA
from capibara_eqx.layers import MoE
from capibara_eqx.transforms import (
    NM,
    Affine,
    Rule,
    Ternary,
    calibrate,
    check,
    lora,
    prepare_qat,
    quantize,
)


pytestmark = pytest.mark.errors
SPECS = {
    "narrow": Affine(8),
    "int4": Affine(4, group_size=3, range="narrow"),
    "full": Affine(4, group_size=3),
    "asymmetric": Affine(3, symmetric=False),
    "learned": Affine(5, learned_step=True),
    "ternary": Ternary(),
    "base3": Ternary(packing="base3"),
    "2:4": NM(2, 4),
    "2:3": NM(2, 3),
    "static": Affine(8, activations="static_int8"),
}
# What makes a code, a byte or a place that cannot be, and what is said of it.
DAMAGE = {
    "narrow": (0, "the code 0"),
    # The low half is a code that is there, the high one is none.
    "int4": (0x07, "the code 0"),
    "ternary": (0b10101000, "the code -2"),
    "base3": (243, "the byte 243"),
    "2:3": (0b11111111, "the place 3"),
}
D = 12


@functools.cache
def model():
    return {"a": [filled(eqx.nn.Linear, D, 5, seed=0, size=1.0)], "b": jnp.ones(3)}


@functools.cache
def small(name):
    spec = SPECS[name]
    rules = [Rule("a/0/weight", spec)]
    found = None
    if name == "static":
        run = lambda m, x: jax.vmap(m["a"][0])(x)
        found = calibrate(model(), run, [jnp.ones((3, D))], rules)
    return quantize(model(), rules, calibration=found)[0]


def damaged(name, part, where, value):
    """As it would be read from a file that has another number there."""
    node = small(name)["a"][0].weight
    leaf = np.array(getattr(node, part))
    leaf[where] = value
    return eqx.tree_at(
        lambda m: getattr(m["a"][0].weight, part), small(name), jnp.asarray(leaf)
    )


@settings(max_examples=50)
@given(name=st.sampled_from([*SPECS]), seed=st.integers(0, 2**32 - 1))
def test_what_transforms_write_is_whole(name, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((5, D)) * 2.0 ** rng.integers(-20, 20)
    other = eqx.tree_at(
        lambda m: m["a"][0].weight, model(), jnp.asarray(weight, jnp.float32)
    )
    rules = [Rule("a/0/weight", SPECS[name])]
    if name == "static":
        other = small(name)
    made, _ = quantize(other, rules)
    assert check(made) is made
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, made)
    file.seek(0)
    assert eqx.tree_equal(check(eqx.tree_deserialise_leaves(file, made)), made)


@settings(max_examples=50)
@given(name=st.sampled_from([*DAMAGE]), row=st.integers(0, 4), data=st.data())
def test_a_code_that_stands_for_nothing(name, row, data):
    part = "places" if name == "2:3" else "codes"
    size = getattr(small(name)["a"][0].weight, part).shape[-1]
    # Not the last byte of all: what fills it up is not read.
    column = data.draw(st.integers(0, size - 2))
    value, words = DAMAGE[name]
    broken = damaged(name, part, (row, column), value)
    with refused("check", "'a/0/weight'", str(SPECS[name]), words, "Copy its file"):
        check(broken)


@settings(max_examples=50)
@given(
    name=st.sampled_from([n for n in SPECS if ":" not in n]),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0]),
)
def test_a_step_that_is_none(name, value):
    broken = damaged(name, "scale", (0, -1), value)
    with refused("check", "'a/0/weight'", f"the step {value}", "not positive"):
        check(broken)


def test_a_step_of_inputs_and_values_that_are_none():
    with refused("'a/0/weight'", "a8 static", "the step of inputs -1.0"):
        check(damaged("static", "input_scale", (), -1.0))
    with refused("'a/0/weight'", "2:4", "the value nan"):
        check(damaged("2:4", "values", (2, 3), np.nan))
    with refused("the place 0", "not in its group or not in order"):
        check(damaged("2:4", "places", (1, 0), 0))


def test_what_training_left_that_is_no_number():
    rules = [Rule("a/0/weight", Affine(4, learned_step=True))]
    fake, _ = prepare_qat(model(), rules)
    below = eqx.tree_at(lambda m: m["a"][0].weight.step, fake, replace_fn=lambda s: -s)
    assert check(below) is below  # Its size is what counts.
    broken = eqx.tree_at(
        lambda m: m["a"][0].weight.step, fake, replace_fn=lambda s: s * jnp.nan
    )
    with refused("'a/0/weight'", "int4", "the learned step nan"):
        check(broken)
    adapted, _ = lora(model(), [Rule("a/0/weight", LoRA(2))], key=jax.random.key(0))
    assert check(adapted) is adapted
    for part in ("a", "b"):
        broken = eqx.tree_at(
            lambda m, part=part: getattr(m["a"][0].weight, part),
            adapted,
            replace_fn=lambda x: x.at[0, 0].set(jnp.inf),
        )
        with refused("'a/0/weight'", "the value of an adapter inf"):
            check(broken)


def test_under_an_adapter_in_training_and_in_a_stack():
    broken = damaged("narrow", "codes", (1, 2), 0)
    adapted, _ = lora(broken, [Rule("a/0/weight", LoRA(2))], key=jax.random.key(0))
    with refused("'a/0/weight'", "int8", "the code 0"):
        check(adapted)
    fake, _ = prepare_qat(model(), [Rule("a/0/weight", Affine(4))])
    assert check(fake) is fake
    fake = eqx.tree_at(
        lambda m: m["a"][0].weight.weight, fake, jnp.full((5, D), jnp.nan)
    )
    with refused("'a/0/weight'", "the value nan"):
        check(fake)
    experts, _ = quantize(
        filled(MoE, 3, 4, 2, 5, seed=0, size=1.0),
        [Rule("router.*", None), Rule(".*", Ternary())],
    )
    assert check(experts) is experts
    broken = eqx.tree_at(
        lambda m: (m.up.codes, m.down.scale),
        experts,
        (experts.up.codes.at[3].set(0), experts.down.scale.at[1].set(jnp.inf)),
    )
    with refused("'up'", "the code -2", "'down'", "the step inf"):
        check(broken)


def test_a_file_read_into_a_model_of_other_rules():
    """Two bits are two bits: zero is a code of one and not of the other."""
    other, _ = quantize(model(), [Rule("a/0/weight", Affine(2, granularity="tensor"))])
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, other)
    file.seek(0)
    with refused("'a/0/weight'", "the code -2", "other rules"):
        check(eqx.tree_deserialise_leaves(file, small("ternary")))


def test_a_long_list_is_cut():
    many = [filled(eqx.nn.Linear, 4, 4, seed=0, size=1.0) for _ in range(8)]
    made, _ = quantize(many, [Rule(".*weight", Affine(8))])
    broken = jax.tree.map(
        lambda leaf: leaf * jnp.nan if eqx.is_inexact_array(leaf) else leaf, made
    )
    with refused("'0/weight'", "'4/weight'", "and 3 more"):
        check(broken)
