"""Meta-learning: what is judged, claimed and shown; learning itself is slow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from benchmarks._records import read_records
from benchmarks.evidence import _few_shot, few_shot_digits, omniglot, sinusoid
from benchmarks.evidence.__main__ import main
from benchmarks.evidence._experiments import EXPERIMENTS
from benchmarks.evidence._meta_training import margin
from benchmarks.evidence._models import ReLUNetwork
from benchmarks.evidence._records import Outcome, last_run
from capibara_eqx.meta import Task, WithRates
from capibara_eqx.meta.tasks import sample_sinusoids


def sine_record(model, found, steps=7):
    results = sinusoid.summary(np.asarray(found, float))
    schedule = {"schedule": {"steps": steps}}
    return {"model": model, "results": results, "settings": schedule, "wall_s": 1.0}


def test_errors_that_overflow_are_counted_and_shown():
    found = np.full((4, 11), 0.25)
    found[:, 1] = (0.1, 0.2, 0.3, 0.4)
    found[0, 2] = np.inf
    found[1:, 5] = np.nan
    found[0, 10] = 1e9
    record = sine_record("Meta-SGD, 5 shots", found)
    results = record["results"]
    assert results["overflown"] == [0, 0, 1, 0, 0, 3, 0, 0, 0, 0, 0]
    assert results["mean"][1] == pytest.approx(0.25)
    half = 1.96 * np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2
    assert results["margin"][1] == pytest.approx(half, rel=1e-3)
    assert results["mean"][2] is None
    assert results["median"][2] == 0.25
    assert results["median"][5] is None
    row = sinusoid.tables([record])[2]
    assert "| 0.250 ± 0.127 | median 0.25, 1 overflown |" in row
    assert "| overflows, 3 overflown | median 0.25, mean 2e+08 |" in row
    assert "0.90 ± 0.16 [1] | 7 |" in row


def test_sines_are_claimed_after_one_step_from_ten_shots():
    def constant(model, value):
        return sine_record(model, np.full((3, 11), value))

    records = [constant("MAML, 5 shots", 0.9), constant("MAML, 10 shots", 0.3)]
    records.append(constant("CAVIA, 10 shots", 0.25))
    bars = {bar.name: bar for bar in sinusoid.bars(records)}
    assert bars["sinusoid_MAML"].value == 0.3
    assert bars["sinusoid_MAML"].passed
    assert not bars["sinusoid_CAVIA"].passed


def test_rates_that_are_too_large_show_in_the_errors():
    tasks = sample_sinusoids(jax.random.key(0), 3, shots=2, queries=2)
    network = ReLUNetwork((1, 8, 1), key=jax.random.key(1))
    learner = WithRates.init(network, 1e6)
    method = sinusoid.METHODS["Meta-SGD"]
    found = sinusoid.errors(sinusoid.predictions(method, learner, tasks), tasks)
    assert np.isfinite(found[:, 0]).all()
    assert (~(found[:, 1:] < 1e6)).all()


def task_of_pixels():
    rng = np.random.default_rng(0)
    support, query = rng.random((6, 2, 2)), rng.random((9, 2, 2))
    labels = np.array([0, 1, 2, 0, 1, 2])
    arrays = [jnp.asarray(a, "float32") for a in (support, query)]
    task = Task((arrays[0], jnp.asarray(labels)), (arrays[1], jnp.zeros(9, int)))
    return support.reshape(6, 4), query.reshape(9, 4), labels, task


def test_raw_pixels_are_told_apart_as_a_loop_does():
    support, query, labels, task = task_of_pixels()
    found = {
        baseline: np.asarray(logits(task, 3)).argmax(axis=1).tolist()
        for baseline, logits in {
            "nearest": _few_shot.nearest_pixels,
            "cosine": _few_shot.cosine_pixels,
            "mean": _few_shot.prototype_pixels,
            "ridge": _few_shot.ridge_pixels,
        }.items()
    }
    means = np.stack([support[labels == k].mean(axis=0) for k in range(3)])
    system = support.T @ support + np.eye(4)
    ridge = np.linalg.solve(system, support.T @ np.eye(3)[labels])
    unit = support / np.linalg.norm(support, axis=1, keepdims=True)
    distances = lambda row, rows: np.linalg.norm(rows - row, axis=1)
    assert found == {
        "nearest": [labels[distances(q, support).argmin()] for q in query],
        "cosine": [labels[(unit @ q).argmax()] for q in query],
        "mean": [distances(q, means).argmin() for q in query],
        "ridge": [(q @ ridge).argmax() for q in query],
    }


@pytest.mark.parametrize("side", [4, 5])
def test_patches_make_a_convolution_of_stride_two(side):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(3, 3, 3))
    patches = np.asarray(omniglot._patches(jnp.asarray(x, "float32")))
    found = patches @ kernel.reshape(-1)
    for image, own in zip(x, found, strict=True):
        parts = [
            scipy.signal.correlate2d(image[..., c], kernel[..., c], mode="same")
            for c in range(3)
        ]
        same = np.sum(parts, axis=0)
        np.testing.assert_allclose(own, same[::2, ::2], atol=1e-5)


def character_record(model, accuracy, step, pixels=0.5):
    found = {"accuracy": accuracy, "margin": 0.01}
    other = {"accuracy": pixels, "margin": 0.02}
    results = {
        **found,
        "trained_s": 9.0,
        "pixels": dict.fromkeys(omniglot.PIXELS, other),
    }
    curve = [{"step": step, "accuracy": accuracy}]
    return {
        **{"model": model, "seed": 0, "results": results, "curve": curve},
        "parameters": 3,
    }


def test_the_last_checkpoint_counts():
    records = [
        character_record("R2-D2, 1 shots", 0.7, 10),
        character_record("R2-D2, 1 shots", 0.9, 20),
        character_record("MAML, 5 shots", 0.4, 20),
    ]
    text = "\n".join(omniglot.tables(records))
    assert "| R2-D2, 1 shot | 90.0 ± 1.0 | 20 | 9 | 3 |" in text
    assert "| pixels, ridge, 1 shot | 50.0 ± 2.0 |" in text
    assert "70.0" not in text
    bars = {bar.name: bar for bar in omniglot.bars(records)}
    assert bars["omniglot_R2-D2_1_shots"].value == pytest.approx(40)
    assert bars["omniglot_R2-D2_1_shots"].passed
    assert not bars["omniglot_MAML_5_shots"].passed


def test_what_had_its_time_is_not_trained_again(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 7, 5, 5))
    np.savez(tmp_path / "some.npz", X=images.astype(np.uint8))
    trained = []

    def outcomes(name, shots, seed, pool, settings):
        trained.append((name, shots, seed))
        return iter([])

    monkeypatch.setattr(omniglot, "_outcomes", outcomes)
    begun = [
        {
            **character_record(model, 0.5, step),
            "settings": {"seconds": seconds, "schedule": {"steps": 20}},
        }
        for model, step, seconds in [
            ("R2-D2, 1 shots", 10, 10.0),
            ("R2-D2, 1 shots", 15, 8.0),
            ("MAML, 1 shots", 10, 10.0),
            ("ProtoNet, 5 shots", 20, 10.0),
        ]
    ]
    assert list(omniglot.run(True, tmp_path / "some.npz", begun)) == []
    assert trained == [
        ("MAML", 1, 0),
        ("ProtoNet", 1, 0),
        ("R2-D2", 5, 0),
        ("MAML", 5, 0),
    ]


def test_an_interrupted_run_goes_on_under_its_name(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 7, 5, 5))
    np.savez(tmp_path / "some.npz", X=images.astype(np.uint8))
    arguments = ["--quick", "--results", str(tmp_path), "--only", "omniglot"]
    arguments += ["--omniglot", str(tmp_path / "some.npz")]
    seen = []

    def run(quick, path, begun):
        seen.append([r["model"] for r in begun])
        yield Outcome(f"learner {len(seen)}", 0, {}, 1, {})

    experiment = dataclasses.replace(EXPERIMENTS["omniglot"], run=run)
    monkeypatch.setitem(EXPERIMENTS, "omniglot", experiment)
    for more in ([], ["--resume"], []):
        assert main([*arguments, *more]) == 0
    first, second, _ = read_records([tmp_path / "omniglot.jsonl"])
    assert seen == [[], ["learner 1"], []]
    assert first["run"] == second["run"]
    assert [r["model"] for r in last_run([first, second], "omniglot")] == [
        "learner 1",
        "learner 2",
    ]


def test_only_characters_are_gone_on_with(capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--resume", "--only", "parity"])
    assert "--resume goes with --only omniglot" in capsys.readouterr().err


def test_characters_are_skipped_without_their_file(tmp_path, capsys):
    arguments = ["--quick", "--results", str(tmp_path), "--only", "omniglot"]
    assert main(arguments) == 0
    assert "Skipped: its data come with no package" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_pixels_of_a_seed_count_once():
    def record(model, accuracy, seed, pixels):
        found = {"accuracy": accuracy, "margin": 0.01}
        results = {**found, "pixels": {"accuracy": pixels, "margin": 0.02}}
        own = {"model": model, "seed": seed, "results": results}
        return {**own, "parameters": 3, "wall_s": 1.0}

    records = [record("R2-D2", 0.95, 0, 0.7), record("R2-D2", 0.97, 1, 0.8)]
    records.append(record("MAML", 0.93, 0, 0.7))
    # Judged by other tasks.
    records.append(record("MAML, new classes", 0.6, 0, 0.65))
    bars = {bar.name: bar for bar in few_shot_digits.bars(records)}
    assert bars["few_shot_digits_R2-D2"].value == 96.0
    assert not bars["few_shot_digits_MAML"].passed
    assert bars["few_shot_digits_pixels"].value == pytest.approx(0.7)
    text = "\n".join(few_shot_digits.tables(records))
    assert "| nearest pixels | 75.0 ± 2.0 |" in text
    images, classes = text.split("With classes held out:")
    assert "| MAML | 93.0 ± 1.0 |" in images
    assert "| MAML | 60.0 ± 1.0 |" in classes
    assert "| nearest pixels | 65.0 ± 2.0 |" in classes


def test_a_margin_is_that_of_the_mean():
    values = np.array([1.0, 2.0, 4.0])
    deviation = np.sqrt(((values - values.mean()) ** 2).sum() / 2)
    assert margin(values) == pytest.approx(1.96 * deviation / np.sqrt(3))


@pytest.mark.slow
def test_five_digits_are_told_apart():
    """R2-D2 and MAML on one seed, for a fifth of the steps of docs/evidence.md."""
    pytest.importorskip("sklearn")
    settings = few_shot_digits.Settings(
        schedule=few_shot_digits.MetaSchedule(200, 8, 1e-3, evaluations=1)
    )
    for name in ("R2-D2", "MAML"):
        outcome = few_shot_digits._outcome(name, 0, settings)
        assert outcome.results["accuracy"] > 0.9
        pixels = outcome.results["pixels"]["accuracy"]
        assert pixels == pytest.approx(0.757, abs=0.03)


@pytest.mark.slow
def test_cavia_learns_sines_sooner_than_maml_does():
    schedule = sinusoid.MetaSchedule(2000, 25, 1e-3, evaluations=1)
    settings = sinusoid.Settings(schedule)
    found = {
        name: sinusoid._outcome(name, 10, 0, settings).results["mean"]
        for name in ("MAML", "CAVIA")
    }
    assert found["CAVIA"][1] < 0.5
    assert found["CAVIA"][1] < found["MAML"][1] < found["MAML"][0]
