"""Run folders that are incomplete or damaged, or whose text is another one."""

import json

import numpy as np
import pytest
from support.messages import refused
from support.tiny import tiny_config, tiny_corpus

from capibara_eqx.train import (
    CheckpointError,
    RunFolder,
    Trainer,
    cached_logits_error,
    plot_loss,
    train,
)


TEXT = {"source": "a poem", "sha256": "a" * 64}
LINE = {"step": 10, "loss": 1.0, "bits_per_byte": 1.5, "elapsed": 2.0}


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", tiny_config(), TEXT)


def test_same_text_passes(run):
    assert run.check_text({"source": "the poem, elsewhere", "sha256": "a" * 64})
    assert json.loads(run.text_path.read_text()) == TEXT


def test_text_that_was_not_noted_is_noted(run):
    run.text_path.unlink()
    assert not run.check_text(TEXT)
    assert run.check_text(TEXT)


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20}\n', "\0\0\n", "\n"])
def test_torn_last_line_is_left_out(run, torn):
    run.append_metrics(LINE)
    with run.metrics_path.open("a") as file:
        file.write(torn)
    assert run.read_metrics() == [LINE]


def test_speed_of_a_run_resumed_at_its_end_is_that_of_the_run(tmp_path):
    config = tiny_config(steps=5)
    trainer = Trainer(config, tiny_corpus())
    run = RunFolder.create(tmp_path / "run", config)
    with run.checkpoints() as checkpoints:
        first = train(trainer, run, checkpoints)
        again = train(trainer, run, checkpoints)
    assert again.step == first.step == 5
    # The elapsed time goes on from that of the checkpoint, and so does the count.
    assert again.elapsed >= first.elapsed
    for result in (first, again):
        assert result.tokens_per_second == pytest.approx(5 * 64 / result.elapsed)


def test_run_without_its_first_checkpoint_begins_again(tmp_path):
    config = tiny_config(steps=2)
    run = RunFolder.create(tmp_path / "run", config)
    run.append_metrics(LINE)  # checkpoint_every is 20
    with run.checkpoints() as checkpoints:
        assert train(Trainer(config, tiny_corpus()), run, checkpoints).step == 2
    assert [line["step"] for line in run.read_metrics()] == [2]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cached_logits_of_very_few_tokens(size):
    trainer = Trainer(tiny_config(), tiny_corpus())
    model = trainer.init_state().model
    error, tolerance = cached_logits_error(model, np.arange(size))
    assert error <= tolerance


@pytest.mark.errors
class TestErrors:
    def test_another_text(self, run):
        with refused("a poem", "a" * 64, "a novel", "b" * 64, "--text", "--out"):
            run.check_text({"source": "a novel", "sha256": "b" * 64})

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"[]", "must hold a JSON object, got list"),
            (b"3", "must hold a JSON object, got int"),
            (b"\xff\xfe{", "is no UTF-8 text"),
            (b"{", "is no JSON"),
        ],
    )
    @pytest.mark.parametrize("name", ["config.json", "text.json", "summary.json"])
    def test_file_that_is_no_object(self, run, name, content, words):
        path = run.path / name
        path.write_bytes(content)
        with refused(str(path), words):
            RunFolder.open(run.path)
            run.check_text(TEXT)
            run.read_summary()

    def test_config_with_a_bad_field(self, run):
        values = {**tiny_config().to_dict(), "d_model": "8"}
        run.config_path.write_text(json.dumps(values))
        with refused(str(run.config_path), "`d_model`"):
            RunFolder.open(run.path)

    def test_summary_without_its_fields(self, run):
        run.summary_path.write_text("{}")
        with refused(str(run.summary_path), "`heldout_bits_per_byte`", "--resume"):
            run.read_summary()

    @pytest.mark.parametrize("line", ["{", "3", '{"step": 5}', "\0", "\xff"])
    def test_damaged_line_before_the_last(self, run, line):
        run.append_metrics(LINE)
        with run.metrics_path.open("a", encoding="latin-1") as file:
            file.write(line + "\n")
        run.append_metrics(LINE)
        with refused(f"Line 2 of {run.metrics_path}", "Delete that line"):
            run.read_metrics()

    def test_lost_checkpoints(self, run):
        trainer = Trainer(tiny_config(), tiny_corpus())
        run.append_metrics({**LINE, "step": 30})  # checkpoint_every is 20
        before = run.metrics_path.read_text()
        with (
            run.checkpoints() as checkpoints,
            pytest.raises(CheckpointError, match=r"goes to step 30 .*Put them back"),
        ):
            train(trainer, run, checkpoints)
        assert run.metrics_path.read_text() == before

    def test_file_that_cannot_be_written(self, run):
        # A folder in its place is in the way of root, too.
        run.metrics_path.mkdir()
        run.summary_path.mkdir()
        run.plot_path.mkdir()
        with pytest.raises(OSError, match=f"Could not write {run.metrics_path}"):
            run.append_metrics(LINE)
        with pytest.raises(OSError, match=f"Could not write {run.summary_path}"):
            run.write_summary({})
        assert not list(run.path.glob("*.tmp"))
        with pytest.raises(OSError, match=f"Could not write {run.plot_path}"):
            plot_loss(run.plot_path, [LINE], 1.0, {})
