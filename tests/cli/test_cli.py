"""The command as a user runs it, on a text of a few thousand bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.tiny import SMALL

from capibara_eqx.cli import main


def test_train_writes_the_run_folder(finished, text):
    code, out = finished
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["references"]) >= {"order0_ngram", "order3_ngram", "zlib"}
    assert 0 < summary["heldout_bits_per_byte"] < 8
    assert summary["tokens_per_second"] > 0
    assert summary["checks"]["passed"] is True
    assert summary["corpus"]["train_bytes"] + summary["corpus"]["heldout_bytes"] == (
        text.stat().st_size
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["d_model"], config["steps"]) == (8, 30)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "checkpoints").iterdir())


def test_generate_and_info(finished, capsys):
    _, out = finished
    texts = []
    for flags in (["--greedy"], ["--greedy", "--seed=5"], ["--top-k=1"]):
        assert main(["generate", str(out), "--prompt=12 and", *flags]) == 0
        texts.append(capsys.readouterr().out)
    # The best byte each time, said in three ways.
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("12 and")
    drawn = set()
    for seed in range(3):
        flags = ["--temperature=2", f"--seed={seed}", "--top-p=0.99"]
        assert main(["generate", str(out), "--prompt=12 and", *flags]) == 0
        drawn.add(capsys.readouterr().out)
    assert len(drawn) == 3
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "total" in shown
    assert "FLOPs / token" in shown
    assert "this model" in shown


def test_failed_check_is_a_failed_command(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "capibara_eqx.cli._train.cached_logits_error", lambda *_: (1.0, 1e-5)
    )
    arguments = ["train", f"--text={text}", f"--out={tmp_path / 'run'}", "--steps=2"]
    assert main([*arguments, *SMALL]) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["checks"]["passed"] is False


@pytest.mark.slow
def test_interrupt_saves_and_resumes(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "capibara_eqx.cli", "train"]
    arguments = [f"--text={text}", f"--out={out}", "--seconds=600", *SMALL]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not (
        (out / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in shown
    config = json.loads((out / "config.json").read_text())
    # The rest of the run, shortened: its end is not what is tested here.
    (out / "config.json").write_text(json.dumps({**config, "seconds": 1e-3}))
    assert main(["train", f"--resume={out}"]) == 0
    assert (out / "summary.json").exists()


@pytest.mark.errors
class TestErrors:
    def _fails(self, arguments, capsys, *parts, code=1):
        assert main([str(argument) for argument in arguments]) == code
        message = capsys.readouterr().err
        assert message.startswith("capibara: error: ")
        for part in parts:
            assert part in message, message

    def test_text_path(self, tmp_path, capsys):
        empty = tmp_path / "empty.txt"
        empty.touch()
        for path in (tmp_path / "none.txt", empty):
            out = tmp_path / "run"
            command = ["train", "--text", path, "--out", out, "--steps=1"]
            self._fails(command, capsys, str(path))
            # Nothing is left behind that would be in the way of the next try.
            assert not out.exists()

    def test_text_too_short(self, tmp_path, capsys):
        short = tmp_path / "short.txt"
        short.write_text("too short")
        command = ["train", "--text", short, "--out", tmp_path / "run", "--steps=1"]
        self._fails(command, capsys, str(short))
        assert not (tmp_path / "run").exists()

    def test_folder_exists(self, finished, text, capsys):
        _, out = finished
        command = ["train", "--text", text, "--out", out, "--steps=1"]
        self._fails(command, capsys, str(out), "--resume")

    def test_resume_of_a_finished_run(self, finished, capsys):
        _, out = finished
        self._fails(["train", "--resume", out], capsys, "finished", "--out")

    def test_resume_with_another_config(self, finished, capsys):
        _, out = finished
        command = ["train", "--resume", out, "--d-model=16"]
        self._fails(command, capsys, "d_model is 8 there and 16 here")

    def test_generate_without_a_run(self, tmp_path, capsys):
        self._fails(["generate", tmp_path / "none"], capsys, "no run folder")

    def test_empty_prompt(self, finished, capsys):
        self._fails(["generate", finished[1], "--prompt="], capsys, "--prompt")

    def test_bad_setting(self, text, tmp_path, capsys):
        command = ["train", "--text", text, "--out", tmp_path / "r", "--steps=1"]
        self._fails([*command, "--dt-min=1", "--dt-max=0.1"], capsys, "`dt_min`")
        self._fails([*command, "--activation=silo"], capsys, "Did you mean 'silu'")

    def test_unknown_flag(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--d-modle=3"])
        assert stop.value.code == 2
