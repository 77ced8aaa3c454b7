"""What packed products say to wrong arguments: a message names the one at fault."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from capibara_eqx.kernels import (
    pack_codes,
    pack_trits,
    packed_size,
    quant_matmul,
    unpack_codes,
    unpack_trits,
)
from capibara_eqx.kernels._quant_matmul.api import BACKENDS


pytestmark = pytest.mark.errors


def good():
    """Ten inputs of four bits, in groups of four."""
    return {
        "x": jnp.ones((3, 10)),
        "codes": jnp.ones((6, 5), jnp.uint8),
        "scale": jnp.ones((6, 3)),
        "zero": jnp.ones((6, 3), jnp.uint8),
        "bits": 4,
        "group_size": 4,
        "activations": "int8",
    }


WRONG = [
    ("x", jnp.ones(()), ["`x`", "(*batch, in)"]),
    ("x", jnp.ones((3, 12)), ["`codes`", "6 bytes", "12 inputs", "`bits`"]),
    ("codes", jnp.ones(5, jnp.uint8), ["`codes`", "(out, bytes)"]),
    ("codes", jnp.ones((6, 4), jnp.uint8), ["`codes`", "5 bytes", "(6, 4)"]),
    ("scale", jnp.ones((6, 2)), ["`scale`", "(6 or 1, 3)", "(6, 2)"]),
    ("scale", jnp.ones((2, 3)), ["`scale`", "(6 or 1, 3)", "(2, 3)"]),
    ("scale", jnp.ones(6), ["`scale`", "(6 or 1, 3)", "(6,)"]),
    ("zero", jnp.ones((1, 3), jnp.uint8), ["`zero`", "(6, 3)", "(1, 3)"]),
    ("bits", 8, ["`codes`", "10 bytes", "`bits`"]),
    ("bits", 1, ["`bits`", "2", "8", "1"]),
    ("bits", 9, ["`bits`", "8", "9"]),
    ("bits", 4.0, ["`bits`", "integer", "4.0"]),
    ("bits", True, ["`bits`", "integer", "True"]),
    ("group_size", 0, ["`group_size`", "0"]),
    ("group_size", 2.5, ["`group_size`", "2.5"]),
    ("activations", "int4", ["`activations`", "int8", "'int4'"]),
    ("implementation", "xls", ["quant_matmul", "`implementation`", "'xls'", "xla"]),
]


@pytest.mark.parametrize(
    ("name", "value", "words"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)]
)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_wrong_argument_is_named(name, value, words, jitted):
    known = good() | {name: value}
    arrays = {n: v for n, v in known.items() if isinstance(v, jax.Array)}
    fixed = {n: v for n, v in known.items() if n not in arrays}

    def run(arrays):
        return quant_matmul(**arrays, **fixed)

    with pytest.raises(ValueError, match=words[0]) as caught:
        (jax.jit(run) if jitted else run)(arrays)
    for word in words:
        assert word in str(caught.value)


def test_sums_that_may_not_fit_are_refused():
    size = 2**31 // (127 * 255) + 1
    arrays = jnp.ones((1, size)), jnp.ones((1, size), jnp.uint8), jnp.ones((1, 1))
    assert quant_matmul(*arrays, bits=8).shape == (1, 1)
    with pytest.raises(ValueError, match=f"up to {size - 1} inputs. Leave it out"):
        quant_matmul(*arrays, bits=8, activations="int8")


def test_every_implementation_is_named():
    with pytest.raises(ValueError, match="reference") as caught:
        quant_matmul(**good(), implementation="referense")
    for name in BACKENDS:
        assert name in str(caught.value)


PACKED = jnp.ones((2, 3), jnp.uint8)
HALF: Any = 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack_codes(PACKED, 0), ["`bits`", "1", "8", "0"]),
        (lambda: pack_codes(PACKED, 9), ["`bits`", "8", "9"]),
        (lambda: pack_codes(PACKED, HALF), ["`bits`", "integer"]),
        (lambda: pack_codes(PACKED[0, 0], 2), ["pack_codes", "`codes`", "scalar"]),
        (lambda: pack_trits(PACKED[0, 0]), ["pack_trits", "`trits`", "scalar"]),
        (lambda: unpack_codes(PACKED, 9, 3), ["`bits`", "9"]),
        (lambda: unpack_codes(PACKED[0, 0], 2, 3), ["`packed`", "scalar"]),
        (
            lambda: unpack_codes(PACKED, 2, 13),
            ["unpack_codes", "`packed`", "4 bytes", "13 codes", "(2, 3)", "cut off"],
        ),
        (lambda: unpack_codes(PACKED, 2, 8), ["`packed`", "2 bytes", "(2, 3)"]),
        (
            lambda: unpack_trits(PACKED, 16),
            ["unpack_trits", "`packed`", "4 bytes", "16 codes", "base 3"],
        ),
        (lambda: packed_size(3, 9), ["`bits`", "9"]),
    ],
)
def test_packing_names_the_wrong_argument(call, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
