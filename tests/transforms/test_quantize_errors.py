"""Rules, specs and weights that do not fit: the message says which and the fix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.arrays import NM
from capibara_eqx.transforms import (
    Affine,
    Rule,
    Ternary,
    convert,
    prepare_qat,
    quantize,
    report,
)


pytestmark = pytest.mark.errors
MODEL = eqx.nn.MLP(3, 4, 5, 2, key=jax.random.key(0))
ALL = ".*weight"
OPTIONS = [
    ({"bits": 1}, ["`bits`", "between 2 and 8", "1", "Ternary()"]),
    ({"bits": 9}, ["`bits`", "between 2 and 8", "9"]),
    ({"bits": 4.0}, ["`bits`", "integer", "4.0"]),
    ({"bits": True}, ["`bits`", "integer", "True"]),
    ({"symmetric": 1}, ["`symmetric`", "True or False", "1"]),
    ({"granularity": "row"}, ["`granularity`", "'channel'", "'tensor'", "'row'"]),
    ({"group_size": 0}, ["`group_size`", "positive integer", "0"]),
    ({"group_size": 32, "granularity": "tensor"}, ["`group_size`", "32", "Leave one"]),
    ({"range": "fulll"}, ["`range`", "Did you mean 'full'"]),
    ({"range": "full", "symmetric": False}, ["`range`", "symmetric=False", "Leave it"]),
    ({"calibration": "mae"}, ["`calibration`", "'percentile'", "'mae'"]),
    ({"percentile": 50.0}, ["`percentile`", "50"]),
    ({"percentile": 101.0}, ["`percentile`", "at most 100", "101"]),
    ({"learned_step": True, "symmetric": False}, ["`learned_step`", "symmetric=False"]),
    ({"gradient": "clip"}, ["`gradient`", "Did you mean 'clipped'"]),
    ({"activations": "int4"}, ["`activations`", "Did you mean 'int8'"]),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=str)
def test_options_of_affine_codes(options, words):
    with refused(*words):
        Affine(**options)


@pytest.mark.parametrize("spec", [Affine, Ternary])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "floaty", 3])
def test_scales_of_no_known_dtype(spec, dtype):
    with refused("`scale_dtype`", "bfloat16", "float32", str(dtype)):
        spec(scale_dtype=dtype)


def test_options_of_ternary_codes():
    with refused("`scale`", "'l2'", "Did you mean 'absmean'"):
        Ternary(scale="absmeen")
    with refused("`packing`", "'2bit'", "'base3'", "4"):
        Ternary(packing="4")
    with refused("`activations`", "'int4'", "Did you mean 'int8'"):
        Ternary(activations="int4")


transforms = pytest.mark.parametrize("transform", [quantize, prepare_qat])


@transforms
def test_rules_that_are_none(transform):
    name = transform.__name__
    with refused(name, "`rules`", "at least one Rule", "[]"):
        transform(MODEL, [])
    with refused(name, "`rules`", "list"):
        transform(MODEL, Rule(ALL, Affine(8)))
    with refused(name, "`rules`", "('.*'", "Rule(pattern, spec)"):
        transform(MODEL, [(".*", Affine(8))])


@transforms
def test_rules_that_match_nothing(transform):
    name = transform.__name__
    with refused(name, "'weight'", "whole path", "'.*weight.*'", "'layers/0/weight'"):
        transform(MODEL, [Rule("weight", Affine(8))])
    with refused(name, "matches no weight", "Did you mean 'layers/2/weight'"):
        transform(MODEL, [Rule("layers/9/weight", Affine(8))])
    with refused(name, "'.*bias'", "'layers/0/bias'", "not the matrix"):
        transform(MODEL, [Rule(".*bias", Affine(8))])
    with refused(name, "no weight that it could match"):
        transform(eqx.nn.LayerNorm(3), [Rule("weights", Affine(8))])


@transforms
def test_rules_that_others_leave_nothing(transform):
    rules = [Rule(ALL, Affine(8)), Rule("layers/1/weight", None)]
    with refused("'layers/1/weight'", "no effect", "'.*weight'", "before the general"):
        transform(MODEL, rules)
    same = Rule(ALL, Affine(8))
    with refused("no effect", "earlier rule"):
        transform(MODEL, [same, Rule(ALL, Affine(8))])


def test_patterns_that_are_none():
    with refused("`pattern`", "regular expression", "'('", "unterminated"):
        Rule("(", Affine(8))
    with refused("`pattern`", "string", "Rule(pattern, spec)"):
        Rule(Affine(8), ALL)  # pyright: ignore[reportArgumentType]


@transforms
def test_specs_that_are_none(transform):
    name = transform.__name__
    with refused(name, "`spec`", "Affine", "Ternary", "'int8'"):
        transform(MODEL, [Rule(ALL, "int8")])
    with refused(name, "`spec`", "Call it: Affine()"):
        transform(MODEL, [Rule(ALL, Affine)])


@transforms
def test_a_weight_that_cannot_have_the_form(transform):
    with refused(transform.__name__, "'layers/0/weight'", "groups of 2", "3 inputs"):
        transform(MODEL, [Rule("layers/0/weight", NM(1, 2))])


def test_a_weight_that_has_another_form():
    rules = [Rule(ALL, Affine(4))]
    small, _ = quantize(MODEL, rules)
    with refused("'layers/0/weight'", "AffineArray", "int4", "ternary", "`dequantize`"):
        quantize(small, [Rule(ALL, Ternary())])
    with refused("int4", "range='narrow' instead of None", "`dequantize` first"):
        quantize(small, [Rule(ALL, Affine(4, range="narrow"))])
    with refused("prepare_qat", "AffineArray", "training as int4", "`dequantize`"):
        prepare_qat(small, rules)
    fake, _ = prepare_qat(MODEL, rules)
    with refused("quantize", "FakeQuantArray", "`convert` first", "`dequantize`"):
        quantize(fake, rules)
    with refused("prepare_qat", "bits=8 instead of 4", "`convert` first"):
        prepare_qat(fake, [Rule(ALL, Affine(8))])
    for model in (MODEL, small):
        with refused("convert", "`prepare_qat`", "`quantize`"):
            convert(model)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_weight_that_is_not_finite(value):
    weight = MODEL.layers[1].weight.at[0, 1].set(value)
    model = eqx.tree_at(lambda m: m.layers[1].weight, MODEL, weight)
    rules = [Rule(ALL, Affine(4))]
    words = ("'layers/1/weight'", "not finite", "diverge")
    for transform in (quantize, prepare_qat):
        with refused(transform.__name__, *words):
            transform(model, rules)
    fake, _ = prepare_qat(MODEL, rules)
    fake = eqx.tree_at(lambda m: m.layers[1].weight.weight, fake, weight)
    with refused("convert", *words):
        convert(fake)
    compiled = eqx.filter_jit(lambda model: quantize(model, rules)[0])
    with pytest.raises(RuntimeError, match="layers/1/weight"):
        jax.block_until_ready(jax.tree.leaves(compiled(model)))
    # One that no rule takes may be anything.
    quantize(model, [Rule("layers/0/weight", Affine(4))])


def test_a_reference_that_does_not_fit():
    small, _ = quantize(MODEL, [Rule(ALL, Affine(4))])
    other = eqx.nn.MLP(3, 4, 6, 2, key=jax.random.key(0))
    with refused("report", "`reference`", "(5, 3)", "'layers/0/weight'", "(6, 3)"):
        report(small, other)
    with refused("report", "`reference`", "nothing", "before it was compressed"):
        report(small, eqx.nn.LayerNorm(3))
