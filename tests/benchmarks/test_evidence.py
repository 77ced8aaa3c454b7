import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from benchmarks import report as speed_report
from benchmarks._records import read_records
from benchmarks.evidence import (
    _rotating,
    induction_heads,
    linear_system,
    parity,
    report,
    selective_copying,
)
from benchmarks.evidence.__main__ import main
from capibara_eqx.layers import LinearSSM


def run_quickly(folder, *names, options=()):
    only = [word for name in names for word in ("--only", name)]
    assert main(["--quick", "--results", str(folder), *only, *options]) == 0
    return read_records(sorted(folder.glob("*.jsonl")))


def whole(record, steps=(1, 2)):
    assert record["quick"]
    assert record["kind"] == "trained"
    assert record["parameters"] > 0
    assert record["wall_s"] > 0
    assert record["versions"]["jax"] == jax.__version__
    assert tuple(point["step"] for point in record["curve"]) == steps
    assert all(np.isfinite(point["loss"]) for point in record["curve"])
    assert record["settings"]["schedule"]["steps"] == 2
    return True


def test_a_quick_run_leaves_whole_records_and_a_page(tmp_path, capsys):
    folder = tmp_path / "evidence"
    (record,) = run_quickly(folder, "linear_system")
    assert whole(record)
    assert record["results"]["error"] > 0
    page = tmp_path / "page.md"
    options = ["--quick", "--results", str(folder), "--output", str(page)]
    assert report.main(options) == 0
    text = page.read_text()
    assert f"| 0 | {record['results']['error']:.2g} |" in text
    assert "**missed**" in text
    assert (tmp_path / "images" / "evidence-linear_system.svg").exists()
    assert "Recorded in" in capsys.readouterr().out
    # The page of speed and memory has no use for these records.
    with pytest.raises(ValueError, match="make bench"):
        speed_report.main(["--quick", "--results", str(tmp_path), "--output", "no.md"])


@pytest.mark.slow
def test_every_experiment_runs_and_has_its_chapter(tmp_path):
    pytest.importorskip("sklearn")
    images = np.random.default_rng(0).integers(0, 256, (6, 7, 5, 5))
    np.savez(tmp_path / "some.npz", X=images.astype(np.uint8))
    options = ("--omniglot", str(tmp_path / "some.npz"))
    records = run_quickly(tmp_path, options=options)
    assert {r["experiment"] for r in records} == set(report.EXPERIMENTS)
    # What is recorded at checkpoints is whole at the last of them.
    last = {(r["experiment"], r["model"], r["seed"]): r for r in records}
    for (experiment, model, _), record in last.items():
        # What is rounded after training has no curve of its own.
        language = experiment == "compressed_language"
        trained = not language or model in ("float32", "ternary, trained")
        assert whole(record, (1, 2) if trained else ())
    page = report.render(records)
    for experiment in report.EXPERIMENTS.values():
        assert f"## {experiment.title}" in page
    assert len(report.draw(records, tmp_path)) == len(report.EXPERIMENTS)


def test_trials_are_not_reported_unless_asked_for():
    with pytest.raises(ValueError, match="make evidence"):
        report.render([])


def test_selective_copying_asks_for_the_data_in_order():
    settings = selective_copying.Settings(seq=64)
    tokens, data = selective_copying.batch(jax.random.key(0), 4, settings)
    assert tokens.shape == (4, 64 + settings.data_tokens)
    for row, expected in zip(np.asarray(tokens), np.asarray(data), strict=True):
        seen, asked = row[:64], row[64:]
        assert (asked == settings.vocab_size - 1).all()
        assert (seen[seen != 0] == expected).all()


def test_induction_rows_have_the_special_token_twice_and_its_answer():
    settings = induction_heads.Settings()
    tokens, answers = induction_heads.batch(jax.random.key(0), 64, 8, settings)
    for row, answer in zip(np.asarray(tokens), np.asarray(answers), strict=True):
        (first, last) = np.flatnonzero(row == settings.vocab_size - 1)
        assert last == 7
        assert row[first + 1] == answer


def test_induction_rows_in_chunks_are_rows_of_the_task():
    settings = induction_heads.Settings()
    parts = [
        induction_heads.chunk_of(jax.random.key(1), 32, 4, start, 12, settings)
        for start in (0, 4, 8)
    ]
    tokens = np.concatenate([part for part, _ in parts], axis=1)
    for _, answers in parts:
        np.testing.assert_array_equal(answers, parts[0][1])
    for row, answer in zip(tokens, np.asarray(parts[0][1]), strict=True):
        (first, last) = np.flatnonzero(row == settings.vocab_size - 1)
        assert last == 11
        assert row[first + 1] == answer


def test_parity_is_that_of_each_prefix():
    bits, found = parity.batch(jax.random.key(0), 3, 7)
    for row, own in zip(np.asarray(bits), np.asarray(found), strict=True):
        assert own.tolist() == [sum(row[: i + 1]) % 2 for i in range(7)]


@pytest.mark.parametrize("rotates", [True, False])
def test_the_rotating_layer_is_its_formula(rotates):
    layer = _rotating.RotatingSSM(3, rotates=rotates, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    weights = (layer.in_proj.weight, layer.in_proj.bias, layer.out_proj.weight)
    weight, bias, out = (np.asarray(v, np.float64) for v in weights)
    read = np.asarray(x, np.float64) @ weight.T + bias
    u, z, rate, *turn = np.split(read, 4 if rotates else 3, axis=-1)
    angle = np.pi / (1 + np.exp(-4 * turn[0])) if rotates else 0 * u
    h = np.zeros(6, complex)
    rows = []
    for t in range(5):
        h = np.exp(-np.log1p(np.exp(4 * rate[t])) + 1j * angle[t]) * h + u[t]
        rows.append(h.real * z[t] / (1 + np.exp(-z[t])))
    expected = np.array(rows) @ out.T + np.asarray(layer.out_proj.bias, np.float64)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=2e-6)


def test_a_step_continues_a_prefill_of_the_rotating_layer():
    layer = _rotating.RotatingSSM(3, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    _, cache = layer.prefill(x[:4], layer.init_cache())
    last, _ = layer.step(x[4], cache)
    np.testing.assert_allclose(last, layer(x)[4], rtol=0, atol=2e-6)


def test_the_linear_system_is_stable_of_variance_one():
    settings = linear_system.Settings()
    true = linear_system.system(3, settings)
    radii = np.abs(np.linalg.eigvals(true.A))
    assert (radii > 0.8).all()
    assert (radii < 0.95).all()
    impulse = linear_system.answers(true, np.eye(1, 2048))
    np.testing.assert_allclose(np.sum(impulse**2), 1, rtol=1e-9)


def test_the_layer_can_be_the_system():
    true = linear_system.system(0, linear_system.Settings())
    A = np.real(np.asarray(scipy.linalg.logm(true.A)))
    B = np.linalg.solve(true.A - np.eye(len(A)), A @ true.B)
    # The layer reads its state after the step, scipy before it.
    C = true.C @ np.linalg.inv(true.A)
    D = true.D - C @ true.B
    # silu(x) - silu(-x) = x
    signed = np.array([[1.0, -1.0]])
    plain = {"conv_dim": 1, "dropout_rate": 0.0, "residual": False}
    layer = LinearSSM(2, 1, len(A), **plain, key=jax.random.key(0))
    values = (np.ones((2, 1, 1)), A, B * signed, C, D * signed, 0.0)
    layer = eqx.tree_at(
        lambda m: (m.conv.weight, m.A, m.B, m.C, m.D, m.log_dt),
        layer,
        tuple(jnp.asarray(value, jnp.float32) for value in values),
    )
    x = np.random.default_rng(0).normal(size=(2, 24))
    found = np.asarray(linear_system.predicted(layer, jnp.asarray(x, jnp.float32)))
    assert linear_system.relative_error(found, linear_system.answers(true, x)) < 1e-5
