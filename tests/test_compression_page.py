"""The page on compression: its table is measured, its examples run, and show what
they say."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara_eqx.arrays import Affine, Ternary, compress
from capibara_eqx.kernels import unpack_codes
from capibara_eqx.models import mamba_language_model
from capibara_eqx.train import read_rules
from capibara_eqx.transforms import Rule, quantize, report


PAGE = (Path(__file__).parent.parent / "docs" / "compression.md").read_text()
CHAPTERS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
GOES_ON = [title for title in CHAPTERS if title not in ("Schemes", "BitNet")]
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
    pipeline, warming = blocks(CHAPTERS["BitNet"])
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


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """By chapter, the names that its code leaves; each goes on from those before."""
    found, names = {}, {}
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.chdir(tmp_path_factory.mktemp("page"))
        for title in GOES_ON:
            for block in blocks(CHAPTERS[title]):
                exec(block, names)
            found[title] = dict(names)
        yield found


def shown(title: str) -> list[str]:
    return blocks(CHAPTERS[title], "text")


def same_words(text: str, page: str) -> bool:
    """Whether the page shows this table; decibels may differ in their last digit."""
    pairs = zip(text.split(), page.split(), strict=True)
    return all(a == b or abs(float(a) - float(b)) < 0.03 for a, b in pairs)


def equal(a, b) -> bool:
    alike = jax.tree.structure(a) == jax.tree.structure(b)
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return alike and all(np.array_equal(x, y) for x, y in leaves)


@pytest.mark.slow
def test_rules(after):
    names = after["Rules"]
    table, errors = shown("Rules")
    assert same_words(str(names["found"]), table)
    message, model, small = names["message"], names["model"], names["small"]
    told = [
        message(model, [Rule("head", Affine(4))]),
        message(model, [Rule(".*weight", Affine(4)), Rule("head/.*", Affine(8))]),
        message(small, [Rule(".*weight", Affine(8))]),
    ]
    assert " ".join(told).split() == errors.split()


@pytest.mark.slow
def test_quantizing(after):
    names = after["Quantizing"]
    small, rounded = names["small"], names["rounded"]
    assert equal(names["same"], small)
    assert jax.tree.structure(rounded) == jax.tree.structure(names["model"])
    np.testing.assert_allclose(
        names["logits"], rounded(names["x"]), rtol=1e-4, atol=1e-4
    )
    again = report(small, names["model"])
    assert str(again) == str(names["found"])


@pytest.mark.slow
def test_training_with_fake_codes(after):
    names = after["Training with fake codes"]
    fake, ternary, x = names["fake"], names["ternary"], names["x"]
    as_it_is, _ = quantize(names["model"], [Rule(".*weight", names["spec"])])
    measure = eqx.filter_jit(names["loss"])
    assert measure(ternary, ternary) < 0.5 * measure(as_it_is, as_it_is)
    assert not np.allclose(fake.head.weight.step, as_it_is.head.weight.scale, rtol=0.01)
    np.testing.assert_array_equal(ternary.head.weight.scale, fake.head.weight.step)
    run = eqx.filter_jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(ternary, x), run(fake, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gptq(after):
    names = after["GPTQ"]
    error, found = names["error"], names["found"]
    assert error(names["solved"]) < 0.8 * error(names["nearest"])
    (table,) = shown("GPTQ")
    assert same_words(str(found), table)
    hidden, head = found.entries
    assert set(hidden.details) == {"loss", "damp_used", "fallback"}
    assert not hidden.details["fallback"]
    assert hidden.details["damp_used"] == np.float32(0.01)
    assert set(head.details) == {"fallback"}
    assert head.details["fallback"]
    assert hidden.sqnr < report(names["nearest"], names["model"]).entries[0].sqnr


@pytest.mark.slow
def test_sparsity(after):
    names = after["Sparsity"]
    for found in names["found"].entries:
        assert found.nbytes == 0.5625 * found.original_bytes
        assert found.sqnr == np.inf
        assert found.density <= 0.5
    rules = names["erk_rules"](
        names["model"], [Rule(".*weight", names["Unstructured"](0.1))]
    )
    lines = "\n".join(f"{rule.pattern} {rule.spec}" for rule in rules)
    assert lines == shown("Sparsity")[0].strip()
    assert names["chosen"].hidden.weight.density == 0.5


@pytest.mark.slow
def test_adapters(after):
    names = after["Adapters"]
    base, adapted, plain = names["base"], names["adapted"], names["plain"]
    assert equal(adapted.hidden.weight.base, base.hidden.weight)
    node = adapted.hidden.weight
    update, step = np.abs(node.update()), np.asarray(base.hidden.weight.scale)
    assert np.mean(update < step / 2) > 0.5  # most of it
    moved = unpacked(names["lossy"].hidden.weight) != unpacked(base.hidden.weight)
    assert np.mean(moved) < 0.5
    dense = base.hidden.weight.dense()
    np.testing.assert_allclose(plain.hidden.weight, dense + node.update(), rtol=1e-5)
    np.testing.assert_array_equal(
        unpacked(names["again"].hidden.weight.base), unpacked(base.hidden.weight)
    )
    left = report(names["lossy"], plain).entries[0]
    assert left.sqnr is not None
    assert 0 < left.sqnr < 40
    paths = [entry.path for entry in report(names["tuned"]).entries]
    maps = {path.split("/")[-2] for path in paths}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= maps


def unpacked(node):
    return unpack_codes(node.codes, node.spec.bits, node.in_features)


@pytest.mark.slow
def test_rookies(after):
    names = after["Rookies"]
    assert names["routing"].active_count.tolist() == [8] * 5
    up, down = names["found"].entries
    assert up.nbytes == down.nbytes == 1024 * (64 + 4)
    assert up.original_bytes == 1024 * 64 * 4
    _, wide = quantize(names["rookies"], [Rule("down", Affine(8))])
    (entry,) = wide.entries
    assert entry.nbytes == 1024 * 64 * 5 > entry.original_bytes


def test_the_rules_file(tmp_path):
    (table,) = blocks(CHAPTERS["The rules file of the command"], "toml")
    path = tmp_path / "rules.toml"
    path.write_text(table)
    rules = read_rules(path)

    def compressed(key):
        return quantize(mamba_language_model(256, 16, 1, key=key), rules)[1]

    found = eqx.filter_eval_shape(compressed, jax.random.key(0))
    forms = {entry.path.split("/")[-2]: entry.scheme for entry in found.entries}
    assert forms == {
        "embedding": "int8",
        "in_proj": "int4 g64",
        "out_proj": "int4 g64",
    }
