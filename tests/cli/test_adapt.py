"""`capibara adapt`: methods of meta-learning side by side on sines."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from capibara_eqx.cli import main
from capibara_eqx.train import SINE_METHODS, SineComparison, SineConfig, SineFolder


def record_of(out):
    return json.loads((out / "adaptation.json").read_text())


@pytest.fixture
def two_methods(monkeypatch):
    """The command compares a start and MAML only: one training to compile."""
    config = partial(SineConfig, methods=("random", "maml"))
    monkeypatch.setattr("capibara_eqx.cli._adapt.SineConfig", config)


@pytest.mark.slow
@pytest.mark.usefixtures("two_methods")
def test_adapt_writes_its_numbers_and_curves(tmp_path, capsys):
    out = tmp_path / "sines"
    assert main(["adapt", f"--out={out}", "--iterations=3", "--shots=2"]) == 0
    record = record_of(out)
    assert record["settings"] == {"iterations": 3, "shots": 2, "seed": 0}
    assert list(record["methods"]) == ["random", "maml"]
    shown = capsys.readouterr().out
    for name, found in record["methods"].items():
        assert found["iterations"] == (3 if name == "maml" else 0)
        assert found["tasks"] == 600
        assert len(found["mse"]) == len(found["mse_95_percent"]) == 11
        for step in (0, 1, 5, 10):
            # A narrow terminal breaks the cell between its numbers.
            assert f"{found['mse'][step]:.2f}" in shown
        assert len(found["rates"]) == 10
        assert f"rate {found['rates'][0]:g}" in shown
    assert "iteration 3" in shown
    assert (out / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "adaptation.json",
        "adaptation.png",
    ]


@pytest.mark.usefixtures("two_methods")
def test_after_an_interrupt_what_there_is_is_written(tmp_path, capsys, monkeypatch):
    @contextmanager
    def asked():
        yield lambda: True

    monkeypatch.setattr("capibara_eqx.cli._adapt.interrupts", asked)
    out = tmp_path / "sines"
    assert main(["adapt", f"--out={out}", "--iterations=3", "--shots=2"]) == 130
    assert list(record_of(out)["methods"]) == ["random"]
    assert (out / "adaptation.png").exists()
    assert "Stopped early" in capsys.readouterr().out


@pytest.mark.slow
def test_a_method_that_is_stopped_is_scored(tmp_path):
    comparison = SineComparison(SineConfig(iterations=1000, shots=2))
    seen = []
    result = comparison.run(
        "maml", report=lambda done, loss: seen.append(done), should_stop=lambda: True
    )
    assert seen == [result.iterations]
    assert 0 < result.iterations < 1000
    assert np.isfinite(result.errors).all()


@pytest.mark.slow
def test_ctrl_c_ends_it_with_a_table(tmp_path):
    out = tmp_path / "sines"
    command = [sys.executable, "-m", "capibara_eqx.cli", "adapt", f"--out={out}"]
    process = subprocess.Popen(
        [*command, "--iterations=1000000"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    deadline = time.monotonic() + 120
    while not (out / "adaptation.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped early" in shown
    methods = record_of(out)["methods"]
    assert list(methods) == ["random", "joint"]
    assert 0 < methods["joint"]["iterations"] < 1_000_000
    assert (out / "adaptation.png").exists()


@pytest.mark.slow
def test_maml_adapts_better_than_both_baselines(tmp_path):
    out = tmp_path / "sines"
    assert main(["adapt", f"--out={out}"]) == 0
    methods = record_of(out)["methods"]
    assert list(methods) == list(SINE_METHODS)
    for step in (1, 5, 10):
        maml = methods["maml"]
        for baseline in (methods["random"], methods["joint"]):
            gap = baseline["mse"][step] - maml["mse"][step]
            # Twice the interval of a difference of independent means: about four
            # standard errors, and more, since the tasks are the same ones.
            interval = np.hypot(
                baseline["mse_95_percent"][step], maml["mse_95_percent"][step]
            )
            assert gap > 2 * interval, (step, baseline, maml)


@pytest.mark.errors
class TestErrors:
    @pytest.mark.parametrize(
        ("flag", "word"),
        [
            ("--iterations=0", "positive"),
            ("--shots=0", "positive"),
            ("--shots=-1", "positive"),
            ("--shots=1001", "between 1 and 1000"),
            ("--seed=-1", "between 0"),
        ],
    )
    def test_a_refused_setting_leaves_nothing_behind(
        self, flag, word, tmp_path, capsys
    ):
        out = tmp_path / "sines"
        assert main(["adapt", f"--out={out}", flag]) == 1
        name, _, value = flag.removeprefix("--").partition("=")
        message = capsys.readouterr().err
        for part in ("capibara: error: ", f"`{name}` must", word, value):
            assert part in message
        assert not out.exists()

    @pytest.mark.parametrize("flag", ["--iterations=many", "--shots=1.5"])
    def test_a_value_that_is_no_integer(self, flag, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["adapt", flag])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert all(part in message for part in flag.split("="))

    def test_an_existing_folder_is_left_alone(self, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert main(["adapt", f"--out={tmp_path}"]) == 1
        message = capsys.readouterr().err
        assert str(tmp_path) in message
        assert "--out" in message
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_folder_that_is_gone_is_named(self, tmp_path):
        folder = SineFolder.create(tmp_path / "sines")
        folder.path.rmdir()
        again = r"Could not write .*adaptation\.json: .*`capibara adapt`"
        with pytest.raises(OSError, match=again):
            folder.write(SineConfig(), [])

    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match="Did you mean 'maml'"):
            SineConfig(methods=("mamll",))
        with pytest.raises(ValueError, match="at least one"):
            SineConfig(methods=())
