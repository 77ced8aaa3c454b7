"""The report: true bytes, errors in decibel, and the table that it prints."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quant_cases import SPECS, random, weight_of, wide
from support.quant_models import model_of

from capibara_eqx.transforms import (
    Affine,
    Rule,
    Ternary,
    dequantize,
    prepare_qat,
    quantize,
    report,
)


def model() -> dict:
    return {"a": random((12, 128)), "b": random((5, 7), 1), "bias": jnp.ones(12)}


def number(x) -> float:
    return float(x)


def test_bits_and_bytes_of_the_formula():
    """int4, groups of 64, float16 steps: 4 + 16 / 64 bits; asymmetric + 4 / 64."""
    for symmetric, bits in ((True, 4 + 16 / 64), (False, 4 + 20 / 64)):
        spec = Affine(4, symmetric, group_size=64, scale_dtype="float16")
        _, found = quantize(model(), [Rule("a", spec)])
        (entry,) = found.entries
        assert entry.bits_per_weight == pytest.approx(bits)
        assert entry.nbytes == bits * 12 * 128 / 8
        assert entry.original_bytes == 4 * 12 * 128
        assert entry.shape == (12, 128)
        assert found.left_alone == (("b", (5, 7), 140), ("bias", (12,), 48))
        assert found.nbytes == entry.nbytes + 188
        assert found.original_bytes == entry.original_bytes + 188
    # 7 codes of 2 bits are 2 bytes a row, 7 trits 2 as well; 4 bytes for the scale.
    for packing in ("2bit", "base3"):
        _, found = quantize(model(), [Rule("b", Ternary(packing=packing))])
        assert found.entries[0].nbytes == 5 * 2 + 4
    # In training the whole weight is there, and steps where they are learned.
    _, found = prepare_qat(model(), [Rule("b", Affine(4, learned_step=True))])
    assert found.entries[0].nbytes == 4 * 5 * 7 + 4 * 5
    assert found.entries[0].scheme == "fake int4"


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.slow
def test_errors_and_density(name):
    before = model()
    small, found = quantize(before, [Rule("[ab]", SPECS[name])])
    after = dequantize(small)
    for entry in found.entries:
        weight, rounded = wide(before[entry.path]), wide(after[entry.path])
        error = np.sum((weight - rounded) ** 2)
        want = 10 * np.log10(np.sum(weight**2) / error)
        assert number(entry.sqnr) == pytest.approx(want, abs=1e-3)
        assert float(entry.density) == pytest.approx(np.mean(rounded != 0))
        assert entry.scheme == str(SPECS[name])
    again = report(small, before)
    assert eqx.tree_equal(again, found, rtol=1e-5)
    assert all(entry.sqnr is None for entry in report(small).entries)


@pytest.mark.parametrize(("size", "want"), [(0.0, np.inf), (1e-30, 24), (1e30, 24)])
def test_errors_of_zero_small_and_large_weights(size, want):
    """Squares of the numbers themselves would be zero or infinite."""
    weight = jnp.asarray(weight_of(0, (40, 40), power=0) * np.float32(size))
    _, found = quantize([weight], [Rule("0", Affine(5, range="full"))])
    assert number(found.entries[0].sqnr) == pytest.approx(want, abs=3)


def test_the_table():
    small, found = quantize(
        model_of("mlp"),
        [Rule("layers/0/weight", Affine(4, group_size=3)), Rule(".*bias", None)],
    )
    lines = str(found).splitlines()
    assert lines[0].split() == [
        *("path", "scheme", "shape", "bits", "bytes", "SQNR", "dB", "density")
    ]
    path, scheme, group, shape, bits, nbytes, sqnr, density = lines[1].split()
    assert (path, scheme, group, shape) == ("layers/0/weight", "int4", "g3", "4x5")
    # 3 bytes and 2 steps of 4 a row: 44 bytes of 20 weights.
    assert (bits, nbytes) == ("17.600", "44")
    assert float(sqnr) == pytest.approx(number(found.entries[0].sqnr), abs=0.01)
    assert float(density) == pytest.approx(float(found.entries[0].density), abs=1e-3)
    assert lines[2].startswith("left alone: 5 parameters")
    assert "  layers/1/weight (4, 4)" in lines
    others = 4 * (4 * 4 + 3 * 4 + 4 + 4 + 3)
    assert lines[-1].startswith(f"all parameters: {44 + others} bytes of {80 + others}")
    assert str(report(small)).splitlines()[1].split()[:4] == lines[1].split()[:4]


def test_a_report_inside_jit():
    rules = [Rule(".*weight", Affine(8))]
    seen = []

    @eqx.filter_jit
    def compress(model):
        small, found = quantize(model, rules)
        seen.append(str(found))
        return small, found

    _, found = compress(model_of("mlp"))
    assert "traced" in seen[0]
    _, want = quantize(model_of("mlp"), rules)
    assert eqx.tree_equal(found, want, rtol=1e-5)
    assert isinstance(found.entries[0].sqnr, jax.Array)
