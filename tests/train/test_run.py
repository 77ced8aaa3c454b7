"""The loop, its checkpoints and its folder."""

import json
import os
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_config, tiny_corpus

from capibara_eqx.models import mamba_language_model
from capibara_eqx.train import (
    Checkpointer,
    CheckpointError,
    Interrupted,
    NonFiniteLossError,
    RunConfig,
    RunFolder,
    Trainer,
    cached_logits_error,
    heldout_bits_per_byte,
    resumed_differences,
    train,
)


def _bytes(state):
    leaves = jax.tree.leaves(eqx.filter(state, eqx.is_array))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def _after(steps):
    """Says stop once it has been asked `steps` times."""
    asked = 0

    def should_stop():
        nonlocal asked
        asked += 1
        return asked >= steps

    return should_stop


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.2, "scan": True}, pytest.param({}, marks=pytest.mark.slow)],
)
def test_forty_steps_equal_twenty_and_twenty(tmp_path, changes):
    config = tiny_config(**changes)
    trainer = Trainer(config, tiny_corpus())
    straight = RunFolder.create(tmp_path / "straight", config)
    with straight.checkpoints() as checkpoints:
        whole = train(trainer, straight, checkpoints)
    broken = RunFolder.create(tmp_path / "broken", config)
    with broken.checkpoints() as checkpoints, pytest.raises(Interrupted) as stop:
        train(trainer, broken, checkpoints, should_stop=_after(20))
    assert stop.value.step == 20
    # A new trainer and manager, as in a new process.
    trainer = Trainer(config, tiny_corpus())
    with broken.checkpoints() as checkpoints:
        assert checkpoints.latest_step() == 20
        parts = train(trainer, broken, checkpoints)
    assert parts.step == whole.step == 40
    assert _bytes(parts.state) == _bytes(whole.state)
    losses = [
        [line["loss"] for line in run.read_metrics()] for run in (straight, broken)
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path):
    run = RunFolder.create(tmp_path / "run", tiny_config())
    for step in (10, 20, 30):
        run.append_metrics({"step": step, "bits_per_byte": 1.5, "elapsed": 2.0})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    run.rewind_metrics(20)
    assert [line["step"] for line in run.read_metrics()] == [10, 20]


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(
        learning_rate=1e30, clip_norm=None, warmup_fraction=0.9, checkpoint_every=1
    )
    run = RunFolder.create(tmp_path / "run", config)
    with run.checkpoints() as checkpoints:
        with pytest.raises(NonFiniteLossError, match="learning_rate"):
            train(Trainer(config, tiny_corpus()), run, checkpoints)
        trainer = Trainer(config, tiny_corpus())
        step = checkpoints.latest_step()
        assert step is not None
        state, meta = checkpoints.restore(trainer.init_state())
    assert meta["step"] == step
    assert all(
        bool(jnp.all(jnp.isfinite(leaf)))
        for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_inexact_array))
    )


def test_clock_bounds_a_run(tmp_path):
    config = tiny_config(seconds=0.5, checkpoint_every=10**6)
    run = RunFolder.create(tmp_path / "run", config)
    shares = []
    with run.checkpoints() as checkpoints:
        result = train(
            Trainer(config, tiny_corpus()),
            run,
            checkpoints,
            report=lambda p: shares.append(p.share),
        )
        assert checkpoints.latest_step() == result.step
    assert result.elapsed >= 0.5
    assert shares == sorted(shares)
    expected = result.step * 64 / result.elapsed
    assert result.tokens_per_second == pytest.approx(expected)


def test_checkpoint_round_trip_of_any_pytree(tmp_path):
    tree = {
        "a": jnp.arange(3, dtype=jnp.bfloat16),
        "b": (np.float32(2.5) * np.ones((2, 2), np.float32), jax.nn.silu, None, 7),
    }
    template = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, tree)
    with Checkpointer(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree, {"note": step})
        restored, meta = checkpoints.restore(template)
        assert checkpoints.latest_step() == 3
    assert meta == {"note": 3}
    assert restored["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored["a"], tree["a"])
    np.testing.assert_array_equal(restored["b"][0], tree["b"][0])
    assert restored["b"][1:] == (jax.nn.silu, None, 7)
    kept = {p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()}
    assert kept == {"2", "3"}


def test_scoring_counts_every_byte_once():
    # A model that gives every byte the same chance needs 8 bits, whatever the split.
    model = mamba_language_model(256, 4, 1, d_state=2, key=jax.random.key(0))
    flat = eqx.tree_at(
        lambda m: m.embedding.weight, model, jnp.zeros_like(model.embedding.weight)
    )
    text = np.random.default_rng(0).integers(0, 256, 101).astype(np.uint8)
    for rows, chunk in ((1, 101), (7, 4), (64, 256)):
        bits = heldout_bits_per_byte(flat, text, rows=rows, chunk=chunk)
        assert bits == pytest.approx(8.0, abs=1e-5)


def test_scoring_equals_the_definition():
    model = mamba_language_model(256, 4, 1, d_state=2, key=jax.random.key(1))
    model = eqx.tree_at(
        lambda m: m.embedding.weight, model, model.embedding.weight * 50
    )
    text = np.random.default_rng(1).integers(0, 256, 23).astype(np.uint8)
    # One row: each byte given all before it, behind a NUL byte.
    logits = model(jnp.asarray([[0, *text[:-1]]]))[0]
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.mean(np.log2(p[np.arange(23), text]))
    for chunk in (23, 5, 1):
        bits = heldout_bits_per_byte(model, text, rows=1, chunk=chunk)
        assert bits == pytest.approx(expected, rel=1e-5)


def test_checks_pass_and_can_fail(tmp_path):
    config = tiny_config(steps=5)
    trainer = Trainer(config, tiny_corpus())
    run = RunFolder.create(tmp_path / "run", config)
    with run.checkpoints() as checkpoints:
        result = train(trainer, run, checkpoints)
        error, tolerance = cached_logits_error(
            result.state.model, tiny_corpus().heldout[:33]
        )
        assert error <= tolerance < 1e-3
        copy = jax.tree.map(
            lambda x: jnp.copy(x) if eqx.is_array(x) else x, result.state
        )
        assert resumed_differences(trainer, copy, checkpoints, result.step) == []
        moved = eqx.tree_at(
            lambda s: s.model.norm.weight,
            result.state,
            jnp.full((8,), 1.000001),
        )
        differing = resumed_differences(trainer, moved, checkpoints, result.step)
    assert any("norm" in name for name in differing)


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny import tiny_config, tiny_corpus
from capibara_eqx.train import RunFolder, Trainer, train
config = tiny_config(steps=10**6, checkpoint_every=3)
run, config = RunFolder.open({run!r})
print("ready", flush=True)
with run.checkpoints() as checkpoints:
    train(Trainer(config, tiny_corpus()), run, checkpoints)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_from_a_whole_checkpoint(tmp_path):
    config = tiny_config(steps=10**6, checkpoint_every=3)
    run = RunFolder.create(tmp_path / "run", config)
    trainer = Trainer(config, tiny_corpus())
    tests = os.path.dirname(os.path.dirname(__file__))
    code = _KILLED.format(tests=tests, run=str(run.path))
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # Past compiling, then at any point of some dozen checkpoints.
        time.sleep(3 + 3 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with run.checkpoints() as checkpoints:
            step = checkpoints.latest_step()
            if step is None:
                continue
            state, meta = checkpoints.restore(trainer.init_state())
        assert meta["step"] == step == int(state.step)
        assert all(
            bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.opt_state)
        )
        steps.append(step)
    assert steps == sorted(steps)
    assert len(set(steps)) >= 5, steps
    # The last one equals a run of as many steps that was never killed.
    reference = trainer.init_state()
    for number in range(steps[-1]):
        reference, _ = trainer.step(reference, number, number / 10**6)
    assert _bytes(state) == _bytes(reference)


@pytest.mark.errors
class TestErrors:
    def test_folder_that_exists(self, tmp_path):
        (tmp_path / "run").mkdir()
        RunFolder.create(tmp_path / "run", tiny_config())  # an empty one is fine
        with pytest.raises(FileExistsError, match="--out.*--resume"):
            RunFolder.create(tmp_path / "run", tiny_config())

    def test_folder_that_is_missing_or_incomplete(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="capibara train"):
            RunFolder.open(tmp_path / "none")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
            RunFolder.open(tmp_path / "empty")
        (tmp_path / "empty" / "config.json").write_text('{"steps": 4')
        with pytest.raises(ValueError, match="is no JSON"):
            RunFolder.open(tmp_path / "empty")
        (tmp_path / "empty" / "config.json").write_text('{"stepz": 4}')
        with pytest.raises(ValueError, match="'stepz'. Did you mean 'steps'"):
            RunFolder.open(tmp_path / "empty")

    def test_folder_of_another_config(self, tmp_path):
        run = RunFolder.create(tmp_path / "run", tiny_config())
        run.check_config(tiny_config(), {"d_model": 8})
        with pytest.raises(ValueError, match="d_model is 8 there and 9 here"):
            run.check_config(tiny_config(), {"d_model": 9})

    def test_checkpoint_of_another_model(self, tmp_path):
        with Checkpointer(tmp_path / "c") as checkpoints:
            with pytest.raises(CheckpointError, match="no whole checkpoint"):
                checkpoints.restore({"a": jnp.zeros(2)})
            checkpoints.save(1, {"a": jnp.zeros(2)}, {})
            with pytest.raises(CheckpointError, match="of another model.*'a'"):
                checkpoints.restore({"a": jnp.zeros(3)})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"d_model": -1}, "`d_model` must be positive"),
            ({"steps": None}, "exactly one of `steps` and `seconds`"),
            ({"compute_dtype": "float8"}, "`compute_dtype` must be one of"),
            ({"accumulation": 3}, "`accumulation` = 3 must divide"),
            ({"dropout": 2.0}, "`dropout` must lie between"),
        ],
    )
    def test_settings(self, changes, message):
        with pytest.raises(ValueError, match=message):
            tiny_config(**changes)

    def test_config_json_round_trip(self):
        config = tiny_config(dropout=0.1, remat="full")
        text = json.dumps(config.to_dict())
        assert RunConfig.from_dict(json.loads(text)) == config
