import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _harness, _inputs, _oracle, _peers, report
from benchmarks.__main__ import main
from benchmarks._bars import NAMES, bars
from benchmarks._records import Measurement, read_records
from capibara_eqx.kernels import selective_scan


TRIAL = replace(_harness.QUICK, rounds=2, calls=2)


def run_quickly(folder, *subjects):
    only = [word for subject in subjects for word in ("--only", subject)]
    assert main(["--quick", "--results", str(folder), *only]) == 0
    return read_records(folder.glob("*/*.jsonl"))


def test_a_quick_run_leaves_whole_records_and_a_page(tmp_path, capsys):
    records = run_quickly(tmp_path, "causal_conv", "layout")
    assert len(records) == 8
    assert {r["operation"] for r in records} == {"causal_conv", "selective_scan_layout"}
    assert all(r["quick"] and r["status"] == "measured" for r in records)
    for record in records:
        times = record["evaluation_ms"]
        assert len(times) >= 3
        assert record["median_ms"] == pytest.approx(np.median(times), rel=1e-4)
        assert min(times) > 0
        assert record["compile_ms"] > 0
        assert record["temp_bytes"] >= 0
        assert record["max_error"] < 1e-5
        assert record["versions"]["jax"] == jax.__version__
        assert record["device"]["kind"] in str(next(tmp_path.iterdir()))
    page = tmp_path / "page.md"
    assert (
        report.main(["--quick", "--results", str(tmp_path), "--output", str(page)]) == 0
    )
    text = page.read_text()
    for record in records:
        assert f"{record['median_ms']:.4g} |" in text
        assert f"`{record['implementation']}`" in text
    assert "Recorded in" in capsys.readouterr().out


def test_trials_are_not_reported_unless_asked_for(tmp_path):
    run_quickly(tmp_path, "layout")
    page = tmp_path / "page.md"
    with pytest.raises(ValueError, match="make bench"):
        report.main(["--results", str(tmp_path), "--output", str(page)])
    assert not page.exists()


def test_oracle_agrees_with_the_scan_and_its_gradients():
    inputs = _inputs.scan_inputs(2, 37, 5, 3)
    y, gradients = _oracle.selective_scan_gradients(*inputs.arguments, dy=inputs.dy)
    forward = _oracle.selective_scan(*inputs.arguments)
    np.testing.assert_allclose(y, forward, rtol=1e-12, atol=1e-12)
    got = _harness.with_gradients(
        lambda *arguments: selective_scan(*arguments)[0], jnp.asarray(inputs.dy)
    )(*map(jnp.asarray, inputs.arguments))
    # Sums over at most 74 tokens of numbers rounded to 6e-8.
    assert _harness.max_error(got, (y, gradients)) < 2e-6
    wrong = (y, tuple(g * 1.001 for g in gradients))
    assert _harness.max_error(got, wrong) > 5e-4


def test_oracle_gradients_are_the_slopes_of_its_outputs():
    def slope(function, inputs, cotangent, direction, small=1e-6):
        moved = [
            sum(
                np.sum(
                    cotangent
                    * function(
                        *[
                            x + sign * small * v
                            for x, v in zip(inputs, direction, strict=True)
                        ]
                    )
                )
                * sign
                for sign in (1, -1)
            )
        ]
        return moved[0] / (2 * small)

    rng = np.random.default_rng(0)

    def draw(*shapes):
        return [rng.normal(size=shape) for shape in shapes]

    shape = (2, 7, 3)
    scan = [x.astype(np.float64) for x in _inputs.scan_inputs(2, 7, 3, 2).arguments]
    cases = [
        (_oracle.selective_scan, _oracle.selective_scan_gradients, scan),
        (
            _oracle.linear_recurrence,
            _oracle.linear_recurrence_gradients,
            draw(shape, shape),
        ),
        (
            _oracle.causal_conv,
            _oracle.causal_conv_gradients,
            draw(shape, (3, 1, 4), (3,)),
        ),
    ]
    for function, with_gradients, inputs in cases:
        (cotangent,) = draw(shape)
        direction = draw(*(x.shape for x in inputs))
        _, gradients = with_gradients(*inputs, dy=cotangent)
        along = sum(np.sum(g * v) for g, v in zip(gradients, direction, strict=True))
        expected = slope(function, inputs, cotangent, direction)
        assert along == pytest.approx(expected, rel=1e-6)


def test_oracle_hessian_is_symmetric():
    inputs = _inputs.scan_inputs(1, 6, 3, 2)
    shapes = [x.shape for x in inputs.arguments]
    v, w = (_inputs.normal(seed, *shapes) for seed in (1, 2))

    def form(left, right):
        product = _oracle.selective_scan_hvp(inputs.arguments, inputs.dy, right)
        return sum(np.sum(x * y) for x, y in zip(left, product, strict=True))

    assert form(v, w) == pytest.approx(form(w, v), rel=1e-6)
    assert abs(form(v, w)) > 1e-2


def test_an_absent_peer_is_recorded_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    inputs = _inputs.scan_inputs(1, 4, 2, 2)
    peer = _harness.Contender(
        "mambapy_pscan", lambda: _peers.mambapy_pscan(inputs.arguments, None)
    )
    entries = _harness.entries({"name": "tiny"}, [peer], lambda: None)
    (measurement,) = _harness.race(TRIAL, "selective_scan", "forward", entries)
    assert measurement.status == "missing"
    assert "torch is not installed" in str(measurement.reason)
    assert measurement.median_ms is None
    assert measurement.evaluation_ms == []


def test_contenders_take_turns_and_a_slow_one_is_not_called_again():
    calls = []

    def contender(name, value, **options):
        def run():
            calls.append(name)
            return np.array([value])

        return _harness.Contender(name, lambda: _harness.Prepared(run), **options)

    contenders = [contender("a", 1.0), contender("b", 1.1), contender("c", 1.0)]
    contenders[2] = replace(contenders[2], left_out="too slow here")
    entries = _harness.entries({"name": "s"}, contenders, lambda: np.array([1.0]))
    a, b, c = _harness.race(TRIAL, "operation", "forward", entries)
    # First calls, then two turns of one uncounted and two counted calls each; who
    # begins a turn changes.
    assert "".join(calls) == "ab" + "aaabbb" + "bbbaaa"
    assert len(a.evaluation_ms) == len(b.evaluation_ms) == 4
    assert a.max_error == 0
    assert b.max_error == pytest.approx(0.1)
    assert (c.status, c.reason) == ("left out", "too slow here")

    calls.clear()
    slow = replace(TRIAL, budget_s=0.0)
    (once,) = _harness.race(slow, "operation", "forward", entries[:1])
    assert calls == ["a"]
    assert len(once.evaluation_ms) == 1


def scan_measurement(implementation, mode, ms, spec="small_batch", **fields):
    sizes = {"name": spec, "batch": 1, "seq": 2048, "d_inner": 1536, "d_state": 16}
    return Measurement(
        "selective_scan", implementation, sizes, mode, median_ms=ms, **fields
    )


def test_bars_follow_from_the_medians():
    row, both = "mamba_130m_row", "forward_backward"
    measurements = [
        scan_measurement("xla", "forward", 2.0),
        scan_measurement("mambapy_pscan", "forward", 13.0),
        scan_measurement("xla", both, 10.0, row, temp_bytes=2048 * 1536 * 16),
        scan_measurement("reference", both, 40.0, row),
        scan_measurement("plain_scan", both, 25.0, row),
        scan_measurement("plain_scan_rows", both, 31.0, row),
    ]
    found = {bar.name: bar for bar in bars(measurements)}
    assert {name: bar.value for name, bar in found.items()} == {
        "pscan_forward": 6.5,
        "plain_gradients": 2.5,
        "temporaries": 0.25,
    }
    assert [name for name, bar in found.items() if not bar.passed] == [
        "plain_gradients"
    ]


def test_the_worst_doubling_counts():
    measurements = [
        Measurement(
            "selective_scan_scaling",
            "xla",
            {"name": f"{seq}_tokens", "seq": seq},
            "forward",
            median_ms=ms,
        )
        for seq, ms in ((1024, 2.0), (512, 1.0), (2048, 5.0))
    ]
    (bar,) = bars(measurements)
    assert (bar.name, bar.value, bar.passed) == ("doubling_forward", 2.5, False)


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"schema": 0})])
def test_a_file_that_holds_no_records_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="records.jsonl:1"):
        read_records([path])


def test_the_page_shows_the_claims_that_are_made_in_their_order():
    def bar(name):
        measured = {"limit": 2.0, "at_least": True, "unit": "times", "value": 3.0}
        verdict = {"passed": True, "statement": f"statement of {name}"}
        device = {"kind": "a", "model": "b", "cores": 2}
        return {"kind": "bar", "name": name, "device": device, **measured, **verdict}

    page = report.render(bar(name) for name in ("retired", *reversed(NAMES)))
    assert "statement of retired" not in page
    places = [page.index(f"statement of {name} ") for name in NAMES]
    assert places == sorted(places)
