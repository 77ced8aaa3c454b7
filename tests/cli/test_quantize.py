"""`capibara quantize`: rules from a file, a compressed run that generates."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara_eqx.cli import main
from capibara_eqx.train import (
    RunFolder,
    heldout_bits_per_byte,
    load_model,
    read_rules,
    read_text_corpus,
    write_compression,
)
from capibara_eqx.transforms import (
    NM,
    Affine,
    Rule,
    Ternary,
    dequantize,
    quantize,
    report,
)


RULES = """
[[rule]]
pattern = ".*embedding.*"
spec = "affine"

[[rule]]
pattern = ".*in_proj.*"
spec = "ternary"
packing = "base3"

[[rule]]
pattern = ".*dt_proj.*"
spec = "none"

[[rule]]
pattern = ".*weight"
spec = "affine"
bits = 4
group_size = 8
scale_dtype = "bfloat16"
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return path


@pytest.fixture(scope="module")
def compressed(finished, tmp_path_factory):
    """The exit code and the folder of a compressed run."""
    folder = tmp_path_factory.mktemp("compressed")
    rules, out = folder / "rules.toml", folder / "run"
    rules.write_text(RULES)
    command = ["quantize", str(finished[1]), f"--rules={rules}", f"--out={out}"]
    return main(command), out


def test_rules_are_read_in_order(rules):
    assert read_rules(rules) == [
        Rule(".*embedding.*", Affine()),
        Rule(".*in_proj.*", Ternary(packing="base3")),
        Rule(".*dt_proj.*", None),
        Rule(".*weight", Affine(4, group_size=8, scale_dtype="bfloat16")),
    ]


def test_every_spec_has_a_name(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('[[rule]]\npattern = ".*"\nspec = "nm"\nn = 1\nm = 4\n')
    assert read_rules(path) == [Rule(".*", NM(1, 4))]


def test_the_compressed_run_holds_what_quantize_gives(finished, compressed, rules):
    code, out = compressed
    assert code == 0
    whole = load_model(*RunFolder.open(finished[1]))
    expected, _ = quantize(whole, read_rules(rules))
    small = load_model(*RunFolder.open(out))
    found, wanted = jax.tree.leaves(small), jax.tree.leaves(expected)
    assert jax.tree.structure(small) == jax.tree.structure(expected)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    kinds = {e.path.split("/")[-2]: e.scheme for e in report(small).entries}
    assert kinds["in_proj"].startswith("ternary")
    assert kinds["out_proj"].startswith("int4")


def test_both_losses_are_those_of_the_models(finished, compressed, text):
    facts = json.loads((compressed[1] / "compression.json").read_text())
    run, config = RunFolder.open(finished[1])
    model = load_model(run, config)
    corpus = read_text_corpus(
        text,
        heldout_fraction=config.heldout_fraction,
        min_train_bytes=(config.batch_size + 1) * config.seq_len,
    )
    assert facts["before"] == pytest.approx(
        heldout_bits_per_byte(model, corpus.heldout), rel=1e-6
    )
    small = load_model(*RunFolder.open(compressed[1]))
    # Plain arrays of the same values, multiplied by other loops.
    assert facts["after"] == pytest.approx(
        heldout_bits_per_byte(dequantize(small), corpus.heldout), rel=1e-4
    )
    assert facts["after"] != facts["before"]


def test_generate_and_info_take_the_compressed_run(compressed, capsys):
    _, out = compressed
    assert main(["generate", str(out), "--prompt=12 and", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("12 and")
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("ternary", "as trained", "times smaller"))


def test_a_compressed_run_is_not_trained_or_compressed_again(compressed, rules, capsys):
    _, out = compressed
    assert main(["train", f"--resume={out}"]) == 1
    assert "cannot be trained" in capsys.readouterr().err
    assert main(["quantize", str(out), f"--rules={rules}"]) == 1
    assert "compressed run" in capsys.readouterr().err


def test_a_run_with_codes_that_cannot_be_is_refused(
    compressed, rules, tmp_path, capsys
):
    """Written whole, so that the checksums of the files are right."""
    run, config = RunFolder.open(compressed[1])
    codes = lambda model: model.stack.blocks[0].mixer.in_proj.weight.codes
    small = load_model(run, config)
    broken = eqx.tree_at(codes, small, jnp.full_like(codes(small), 255))
    target = RunFolder.create(tmp_path / "broken", config)
    with target.checkpoints() as checkpoints:
        checkpoints.save(0, broken, {})
    write_compression(target, read_rules(rules), {})
    assert main(["generate", str(target.path), "--prompt=12 and"]) == 1
    message = capsys.readouterr().err
    assert "stack/blocks/0/mixer/in_proj/weight" in message
    assert "the byte 255, which stands for no five values" in message


def test_an_existing_folder_is_left_alone(finished, compressed, rules, capsys):
    command = ["quantize", str(finished[1]), f"--rules={rules}"]
    before = sorted(compressed[1].rglob("*"))
    assert main([*command, f"--out={compressed[1]}"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert sorted(compressed[1].rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rule = 3", "must hold tables [[rule]]"),
        ("", "no rule"),
        ("[[rule]\n", "is no TOML"),
        ('[[rule]]\nspec = "affine"', "rule 1: `pattern` must be text, got None"),
        ('[[rule]]\npattern = "("\nspec = "nm"', "must be a regular expression"),
        ('[[rule]]\npattern = "a"\nspec = "afine"', "Did you mean 'affine'?"),
        ('[[rule]]\npattern = "a"\nspec = "affine"\nbit = 3', "Did you mean 'bits'?"),
        ('[[rule]]\npattern = "a"\nspec = "affine"\nbits = 9', "between 2 and 8"),
        ('[[rule]]\npattern = "a"\nspec = "none"\nbits = 9', "has no `bits`"),
        ('[[rule]]\npattern = "no"\nspec = "ternary"', "matches no weight"),
        (
            '[[rule]]\npattern = "a"\nspec = "affine"\nactivations = "static_int8"',
            'rule 1: activations = "static_int8" needs a calibration',
        ),
    ],
)
def test_bad_rules_are_named(finished, tmp_path, capsys, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    out = tmp_path / "out"
    command = ["quantize", str(finished[1]), f"--rules={path}", f"--out={out}"]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_rules_file_is_named(finished, tmp_path, capsys):
    assert main(["quantize", str(finished[1]), "--rules=nowhere.toml"]) == 1
    assert "nowhere.toml" in capsys.readouterr().err
