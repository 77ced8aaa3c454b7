"""Bad arguments of BitNet158 and the quantizers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused

from capibara_eqx.arrays import NM, FakeQuantArray
from capibara_eqx.layers import (
    AffineQuantizer,
    BitNet158,
    BitNetQuantizer,
    quantize_to_158bit,
)
from capibara_eqx.transforms import Rule, Ternary, prepare_qat, quantize


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)


def any_of(**options: Any) -> dict[str, Any]:
    """Arguments of types that the annotations forbid."""
    return options


def layer(**options):
    return BitNet158(**{"in_features": 4, "out_features": 3, "key": KEY} | options)


# Arguments, what the message says.
ARGUMENTS = [
    ({"in_features": 0}, ["`in_features`", "positive integer", "0"]),
    ({"out_features": 2.5}, ["`out_features`", "2.5"]),
    ({"use_quantization": 1}, ["`use_quantization`", "True or False", "1"]),
    ({"quantization_bits": 1}, ["`quantization_bits`", "1.58", "2 to 8", "got 1"]),
    ({"quantization_bits": 9}, ["`quantization_bits`", "got 9"]),
    ({"quantization_bits": 4.5}, ["`quantization_bits`", "got 4.5"]),
    ({"quantization_bits": True}, ["`quantization_bits`", "True"]),
    ({"quantization_bits": "8"}, ["`quantization_bits`", "'8'"]),
    ({"quantization_bits": 4, "scale": "l2"}, ["`scale`", "'l2'", "Leave one"]),
    ({"scale": "absmaen"}, ["`scale`", "Did you mean 'absmean'"]),
    ({"warmup": 1.5}, ["`warmup`", "between 0 and 1", "1.5"]),
    ({"warmup": float("nan")}, ["`warmup`", "nan"]),
    ({"eps": 0.0}, ["`eps`", "positive"]),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS, ids=str)
def test_arguments_of_the_layer(arguments, words):
    with refused(*words):
        layer(**arguments)


def test_inputs_of_the_layer():
    with refused("BitNet158", "`x`", "4 elements", "(2, 5)"):
        layer()(jnp.ones((2, 5)))


def test_weights_without_codes():
    with refused("get_weights", "codes around zero", "quantize()"):
        layer(use_quantization=False).get_weights()
    sparse = FakeQuantArray.of(jnp.ones((3, 4)), NM(2, 4))
    with refused("get_weights", "SparseArray"):
        eqx.tree_at(lambda m: m.weight, layer(), sparse).get_weights()
    shifted = AffineQuantizer(4, symmetric=False).quantize(jnp.ones((3, 4)))
    with refused("get_weights", "AffineArray"):
        eqx.tree_at(lambda m: m.weight, layer(), shifted).get_weights()


def test_weights_that_cannot_be_packed():
    with refused("BitNet158.quantize", "(3, 4)", "(4, 3)", "out_features"):
        layer().quantize(jnp.ones((4, 3)))
    with refused("BitNet158.quantize", "not finite"):
        layer().quantize(jnp.full((3, 4), jnp.nan))
    broken = eqx.tree_at(lambda m: m.weight.weight, layer(), jnp.full((3, 4), jnp.inf))
    with refused("BitNet158.quantize", "not finite", "diverge"):
        broken.quantize()


def test_transforms_that_come_too_late():
    rules = [Rule("weight", Ternary())]
    with refused("quantize", "'weight'", "convert"):
        quantize(layer(), rules)
    with refused("prepare_qat", "'weight'", "dequantize"):
        prepare_qat(layer().quantize(), rules)


@pytest.mark.parametrize("quantizer", [AffineQuantizer, BitNetQuantizer])
@pytest.mark.parametrize("bits", [1, 9, 1.58, True, "8"])
def test_bits_of_the_quantizers(quantizer, bits):
    with refused("bits`", str(bits)):
        quantizer(bits)


def test_arguments_of_the_quantizers():
    with refused("`channel_wise`", "True or False", "'yes'"):
        AffineQuantizer(**any_of(channel_wise="yes"))
    with refused("`group_size`", "granularity"):
        AffineQuantizer(channel_wise=False, group_size=4)
    with refused("`symmetric`", "1"):
        BitNetQuantizer(**any_of(symmetric=1))
    with refused("BitNetQuantizer", "`x`", "without axes"):
        BitNetQuantizer()(jnp.ones(()))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (AffineQuantizer().quantize, "AffineQuantizer.quantize"),
        (quantize_to_158bit, "quantize_to_158bit"),
    ],
    ids=["affine", "ternary"],
)
def test_weights_that_no_codes_stand_for(function, name):
    with refused(name, "`weights`", "floating point", "int32", "astype"):
        function(jnp.ones((3, 4), "int32"))
    for shape in ((), (0, 3)):
        with refused(name, "at least one axis and one value", str(shape)):
            function(jnp.ones(shape))
    with refused(name, "not finite", "NaN or infinity"):
        function(jnp.asarray([1.0, np.inf]))
    with refused(name, "AffineArray", "compressed already"):
        function(AffineQuantizer().quantize(jnp.ones((3, 4))))
    with pytest.raises(eqx.EquinoxRuntimeError, match="not finite"):
        jax.block_until_ready(eqx.filter_jit(function)(jnp.asarray([1.0, jnp.nan])))


def test_dequantizing_something_else():
    ternary = quantize_to_158bit(jnp.ones((3, 4)))
    with refused("AffineQuantizer.dequantize", "AffineArray", "TernaryArray"):
        AffineQuantizer().dequantize(**any_of(quantized=ternary))
