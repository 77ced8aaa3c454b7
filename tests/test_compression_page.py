"""The page on compression: its table is measured, its examples run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara_eqx.arrays import Affine, Ternary, compress


PAGE = (Path(__file__).parent.parent / "docs" / "compression.md").read_text()
SIZE = 768


def rows() -> list[list[str]]:
    lines = re.findall(r"^\| (\d.*) \|$", PAGE, re.MULTILINE)
    return [[cell.strip(" |") for cell in line.split(" | ")] for line in lines]


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("x"))


@pytest.fixture(scope="module")
def weights():
    return jax.random.normal(jax.random.key(0), (SIZE, SIZE))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1])
def test_the_table_is_measured(row, weights):
    form = row[1].strip("`")
    if form == "float16":
        spec, node = None, weights.astype("float16")
        dense = node
        assert float(jnp.finfo("float16").max) == 65504
    else:
        spec = eval(form, {"Affine": Affine, "Ternary": Ternary})
        node = compress(weights, spec)
        dense = node.dense()
    if isinstance(spec, Affine):
        assert row[2].startswith(f"{spec.limits[0]} to {spec.limits[1]}")
        assert ("zero point" in row[2]) == (not spec.symmetric)
        assert row[0] == str(spec.bits)
    values, nbytes = weights.size, node.nbytes
    assert number(row[4]) == nbytes
    assert abs(number(row[5]) - 8 * nbytes / values) < 0.005
    assert abs(number(row[6]) - 4 * values / nbytes) < 0.005
    assert abs(number(row[7]) - 2 * values / nbytes) < 0.005
    wide, found = np.asarray(weights, "float64"), np.asarray(dense, "float64")
    error = np.sum((wide - found) ** 2)
    # Shown to a tenth; the sums are those of half a million values.
    assert abs(number(row[3]) - 10 * np.log10(np.sum(wide**2) / error)) < 0.06


def test_the_table_is_whole():
    assert [row[0] for row in rows()] == ["16", *["8"] * 2, *["4"] * 3, *["1.58"] * 3]


def test_the_pipeline_of_the_seeds():
    """768 x 768 numbers of 32 bits, to four bits, to three values, in true bytes."""
    pipeline, warming = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(pipeline, names)
        exec(warming, names)
        x, y = jnp.ones((2, SIZE)), jnp.zeros((2, SIZE))
        errors = [names["loss"](names["bitnet"], p, x, y) for p in (0.0, 0.3, 1.0)]
    values = SIZE * SIZE
    assert names["weights"].nbytes == 4 * values
    # Half a byte a weight and a step a row; a quarter and one scale.
    assert names["four_bits"].nbytes == values // 2 + 4 * SIZE
    packed = names["packed"].weight
    assert packed.nbytes == values // 4 + 4
    assert round(4 * values / names["four_bits"].nbytes, 1) == 7.9
    assert round(4 * values / packed.nbytes, 1) == 16.0
    assert round(2 * values / packed.nbytes, 1) == 8.0
    # The three values are those of what four bits stand for.
    wide = np.asarray(names["four_bits"].dense(), "float64")
    gamma = np.mean(np.abs(wide))
    codes = np.where(np.abs(wide) > gamma / 2, np.sign(wide), 0)
    np.testing.assert_array_equal(names["packed"].get_weights(), codes)
    np.testing.assert_allclose(packed.scale[0, 0], gamma, rtol=1e-5)
    assert names["y"].shape == (4, SIZE)
    assert len({float(error) for error in errors}) == 3
