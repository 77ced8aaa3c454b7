"""Runs that are continued, or read while they train, and what may be wrong there."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.processes import run as run_command

from capibara_eqx.cli import main


SMALL = [
    "--d-model=8",
    "--n-layers=1",
    "--d-state=2",
    "--seq-len=16",
    "--batch-size=4",
    "--checkpoint-every=4",
]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    before = os.getcwd()
    os.chdir(text.parent)
    try:
        arguments = ["train", f"--text={text.name}", f"--out={out}", "--steps=12"]
        assert main([*arguments, *SMALL]) == 0
    finally:
        os.chdir(before)
    return out


@pytest.fixture
def stopped(finished, tmp_path):
    """A run whose last step is saved, but that has no summary yet."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    return out


def newest(out):
    return max(out.glob("checkpoints/*[0-9]"), key=lambda path: int(path.name))


def test_the_run_folder_names_its_text(finished, text):
    noted = json.loads((finished / "text.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    assert noted == summary["corpus"]
    assert noted["source"] == str(text)
    assert len(noted["sha256"]) == 64
    assert json.loads((finished / "config.json").read_text())["text"] == str(text)


def test_finished_training_without_a_summary_keeps_its_speed(finished, stopped):
    # From another working directory than it began in.
    assert main(["train", f"--resume={stopped}"]) == 0
    first, again = (
        json.loads((out / "summary.json").read_text()) for out in (finished, stopped)
    )
    # Both of the same 12 steps; the time of the last save is in the first one only.
    assert 0.3 < first["tokens_per_second"] / again["tokens_per_second"] < 1.5
    assert again["heldout_bits_per_byte"] == first["heldout_bits_per_byte"]


def test_text_that_has_moved(stopped, text, tmp_path, capsys):
    moved = tmp_path / text.name
    shutil.copy(text, moved)
    config = json.loads((stopped / "config.json").read_text())
    config["text"] = str(tmp_path / "gone" / text.name)
    (stopped / "config.json").write_text(json.dumps(config))
    assert main(["train", f"--resume={stopped}"]) == 1
    message = capsys.readouterr().err
    assert config["text"] in message
    assert "say with --text where it is now" in message
    assert main(["train", f"--resume={stopped}", f"--text={moved}"]) == 0


def test_resume_passes_over_a_damaged_checkpoint(stopped, capsys):
    shutil.rmtree(newest(stopped) / "state")
    assert main(["train", f"--resume={stopped}"]) == 0
    shown = capsys.readouterr().out
    assert "The checkpoint of step 12" in shown
    assert "the one of step 8 is used instead" in shown
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_resume_says_that_it_begins_again(stopped, capsys):
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "metrics.jsonl").unlink()
    (stopped / "text.json").unlink()
    assert main(["train", f"--resume={stopped}"]) == 0
    shown = capsys.readouterr().out
    assert "begins again at step 0" in shown
    assert "text.json is missing" in shown


def test_one_held_out_byte(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 10)
    out = tmp_path / "run"
    arguments = ["train", f"--text={text}", f"--out={out}", "--steps=2"]
    assert main([*arguments, *SMALL, "--heldout-fraction=0.005"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["corpus"]["heldout_bytes"] == 1


def test_failed_resume_comparison_is_a_failed_command(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "capibara_eqx.cli._train.resumed_differences", lambda *_: [".model.norm"]
    )
    out = tmp_path / "run"
    arguments = ["train", f"--text={text}", f"--out={out}", "--steps=2"]
    assert main([*arguments, *SMALL]) == 1
    checks = json.loads((out / "summary.json").read_text())["checks"]
    assert checks["passed"] is False
    assert checks["resumed_differences"] == [".model.norm"]


@pytest.mark.slow
def test_demo_end_to_end(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "capibara_eqx.cli", "demo"]
    done = run_command(*command, "--seconds=10", f"--out={out}")
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert "FAILED" not in done.stdout
    for name in ("config.json", "text.json", "metrics.jsonl", "summary.json"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checks"]["passed"] is True
    assert summary["training_seconds"] >= 10
    assert newest(out).name == str(summary["steps"])
    # After 10 seconds it has learned more than the frequencies of single bytes.
    references = summary["references"]
    assert set(references) >= {"order0_ngram", "order3_ngram", "zlib"}
    assert 0 < summary["heldout_bits_per_byte"] < references["order0_ngram"]
    assert summary["sample"]
    for name in (*references, "this model"):
        assert name.replace("_", " ") in done.stdout
    # The second part: learning to adapt, beside what is learned by plain training.
    assert (out / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    methods = json.loads((out / "adaptation.json").read_text())["methods"]
    assert list(methods) == ["random", "joint", "maml"]
    assert methods["maml"]["mse"][-1] < methods["joint"]["mse"][-1]
    command = [sys.executable, "-m", "capibara_eqx.cli", "generate"]
    done = run_command(*command, out, "--prompt=def ", "--max-new-bytes=20")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("def ")


_TRAINING = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny import tiny_config, tiny_corpus
from capibara_eqx.train import RunFolder
run, _ = RunFolder.open({run!r})
with run.checkpoints():
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_run_in_training_can_be_read_but_not_resumed(stopped, capsys):
    tests = os.path.dirname(os.path.dirname(__file__))
    code = _TRAINING.format(tests=tests, run=str(stopped))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == "ready\n"
        half_written = stopped / "checkpoints" / "99.orbax-checkpoint-tmp"
        half_written.mkdir()
        assert main(["generate", str(stopped), "--max-new-bytes=3"]) == 0
        assert main(["info", str(stopped)]) == 0
        assert half_written.exists()
        capsys.readouterr()
        assert main(["train", f"--resume={stopped}"]) == 1
        assert half_written.exists()
    message = capsys.readouterr().err
    assert f"process {training.pid}" in message
    assert str(stopped) in message


@pytest.mark.errors
class TestErrors:
    def _fails(self, arguments, capsys, *parts):
        assert main([str(argument) for argument in arguments]) == 1
        message = capsys.readouterr().err
        assert message.startswith("capibara: error: ")
        for part in parts:
            assert part in message, message

    def test_another_text(self, stopped, text, tmp_path, capsys):
        other = tmp_path / text.name
        other.write_text(text.read_text()[::-1])
        noted = json.loads((stopped / "text.json").read_text())["sha256"]
        before = (stopped / "metrics.jsonl").read_text()
        command = ["train", "--resume", stopped, "--text", other]
        self._fails(command, capsys, "another text", noted, str(other), "--out")
        assert (stopped / "metrics.jsonl").read_text() == before

    def test_lost_checkpoints(self, stopped, capsys):
        shutil.rmtree(stopped / "checkpoints")
        before = (stopped / "metrics.jsonl").read_text()
        self._fails(["train", "--resume", stopped], capsys, "goes to step 12")
        assert (stopped / "metrics.jsonl").read_text() == before

    @pytest.mark.parametrize("content", ["{", "{}", "[]"])
    def test_info_of_a_damaged_summary(self, stopped, content, capsys):
        (stopped / "summary.json").write_text(content)
        path = str(stopped / "summary.json")
        self._fails(["info", stopped], capsys, path, "--resume")

    @pytest.mark.parametrize("content", [b"[]", b"3", b"{}", b"\xff\xfe{"])
    def test_damaged_config(self, stopped, content, capsys):
        (stopped / "config.json").write_bytes(content)
        for command in (["info"], ["generate"], ["train", "--resume"]):
            path = str(stopped / "config.json")
            self._fails([*command, stopped], capsys, path)
