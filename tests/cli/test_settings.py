"""Each setting of a run is a flag of the command; what flags may say."""

import argparse
import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from support.tiny import tiny_config, tiny_corpus

from capibara_eqx.cli import main
from capibara_eqx.cli._main import _parser
from capibara_eqx.cli._settings import add_settings, given_settings
from capibara_eqx.models import generate
from capibara_eqx.train import RunConfig, RunFolder, Trainer, load_model


# For every field a flag and the value that it sets, other than the default.
FLAGS: dict[str, tuple[str, Any]] = {
    "text": ("--text=folder", "folder"),
    "pattern": ("--pattern=*.md", "*.md"),
    "heldout_fraction": ("--heldout-fraction=0.1", 0.1),
    "d_model": ("--d-model=8", 8),
    "n_layers": ("--n-layers=3", 3),
    "d_state": ("--d-state=4", 4),
    "d_conv": ("--d-conv=2", 2),
    "expand": ("--expand=3", 3),
    "dt_rank": ("--dt-rank=5", 5),
    "dt_min": ("--dt-min=0.01", 0.01),
    "dt_max": ("--dt-max=0.2", 0.2),
    "dt_init": ("--dt-init=constant", "constant"),
    "dt_scale": ("--dt-scale=2", 2.0),
    "dt_init_floor": ("--dt-init-floor=0", 0.0),
    "bias": ("--bias", True),
    "conv_bias": ("--no-conv-bias", False),
    "activation": ("--activation=gelu", "gelu"),
    "dropout": ("--dropout=0.1", 0.1),
    "tie_embeddings": ("--no-tie-embeddings", False),
    "scan": ("--scan", True),
    "remat": ("--remat=full", "full"),
    "implementation": ("--implementation=reference", "reference"),
    "steps": ("--steps=7", 7),
    "seconds": ("--seconds=1.5", 1.5),
    "seq_len": ("--seq-len=32", 32),
    "batch_size": ("--batch-size=4", 4),
    "accumulation": ("--accumulation=2", 2),
    "learning_rate": ("--learning-rate=1e-3", 1e-3),
    "warmup_fraction": ("--warmup-fraction=0.2", 0.2),
    "final_fraction": ("--final-fraction=0.3", 0.3),
    "weight_decay": ("--weight-decay=0", 0.0),
    "clip_norm": ("--clip-norm=none", None),
    "b1": ("--b1=0.8", 0.8),
    "b2": ("--b2=0.99", 0.99),
    "eps": ("--eps=1e-6", 1e-6),
    "compute_dtype": ("--compute-dtype=bfloat16", "bfloat16"),
    "checkpoint_every": ("--checkpoint-every=5", 5),
    "seed": ("--seed=3", 3),
}
FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


def parsed(command: str, *arguments: str) -> argparse.Namespace:
    return _parser().parse_args([command, *arguments])


@pytest.mark.parametrize("command", ["train", "demo"])
@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_flag(command, name):
    flag, value = FLAGS[name]
    given = given_settings(parsed(command, flag))
    assert given == {name: value}
    assert value != FIELDS[name].default
    # Some settings need others beside them.
    others = {"text": "folder"} if name == "pattern" else {}
    bound = {} if name in ("steps", "seconds") else {"steps": 10}
    assert getattr(RunConfig(**bound, **others, **given), name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_has_help(name):
    parser = argparse.ArgumentParser(add_help=False)
    add_settings(parser, {})
    flag = FLAGS[name][0].partition("=")[0].replace("--no-", "--")
    [action] = [a for a in parser._actions if flag in a.option_strings]
    default = FIELDS[name].default
    words = action.help or ""
    assert words.endswith(f" (default: {'none' if default is None else default})")
    assert not words.startswith(" ")


def test_nothing_given_changes_nothing():
    assert given_settings(parsed("train")) == {}


@pytest.mark.parametrize(
    ("flags", "value"),
    [([], 0), (["--stop-byte=10"], 10), (["--stop-byte", "none"], None)],
)
def test_stop_byte(flags, value):
    assert parsed("generate", "run", *flags).stop_byte == value


def test_generate_without_a_stop_byte(tmp_path, capsys):
    config = tiny_config()
    run = RunFolder.create(tmp_path / "run", config)
    with run.checkpoints() as checkpoints:
        checkpoints.save(0, Trainer(config, tiny_corpus()).init_state(), {})
    command = ["generate", str(run.path), "--prompt=a", "--greedy"]
    first = generate(
        load_model(run, config),
        jnp.asarray([ord("a")]),
        max_new_tokens=1,
        temperature=0.0,
    )
    stop = int(first.tokens[0])
    lengths = []
    for flag in (f"--stop-byte={stop}", "--stop-byte=none"):
        assert main([*command, "--max-new-bytes=3", flag]) == 0
        lengths.append(len(capsys.readouterr().out.strip("\n")))
    assert lengths[0] == 1 < lengths[1]


@pytest.mark.errors
class TestErrors:
    def _stops(self, arguments, capsys, *words):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        missing = [word for word in words if word not in message]
        assert not missing, message

    @pytest.mark.parametrize("value", ["-1", "256", "x", ""])
    def test_stop_byte(self, value, capsys):
        arguments = ["generate", "run", f"--stop-byte={value}"]
        self._stops(arguments, capsys, "--stop-byte", "0 to 255", "none", repr(value))

    def test_a_value_that_is_no_number(self, capsys):
        self._stops(["train", "--d-model=4.5"], capsys, "--d-model", "int", "'4.5'")
        self._stops(["train", "--eps=small"], capsys, "--eps", "number", "'small'")
        self._stops(["train", "--clip-norm=no"], capsys, "--clip-norm", "none")

    @pytest.mark.parametrize(
        "flag",
        [
            "--clip-norm=-1",
            "--b1=2",
            "--b2=-1",
            "--eps=-1",
            "--weight-decay=-1",
            "--dt-init-floor=-1",
            "--dt-init-floor=nan",
            "--learning-rate=inf",
            "--seed=-1",
            "--implementation=xlaa",
            "--dt-rank=foo",
        ],
    )
    def test_a_refused_setting_leaves_nothing_behind(self, flag, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_text("some text " * 1000)
        out = tmp_path / "run"
        command = ["train", f"--text={text}", f"--out={out}", "--steps=1", flag]
        assert main(command) == 1
        name, _, value = flag.removeprefix("--").partition("=")
        message = capsys.readouterr().err
        assert f"`{name.replace('-', '_')}` must" in message
        assert value in message
        assert not out.exists()

    def test_pattern_without_a_folder(self, tmp_path, capsys):
        command = ["train", "--pattern=*.md", f"--out={tmp_path / 'run'}"]
        assert main(command) == 1
        assert "--text FOLDER" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "flag", ["--max-new-bytes=0", "--seed=-1", "--seed=99999999999999999999"]
    )
    def test_flags_of_generate(self, flag, capsys):
        assert main(["generate", "run", flag]) == 1
        name, _, value = flag.partition("=")
        message = capsys.readouterr().err
        assert f"`{name}` must" in message
        assert value in message
