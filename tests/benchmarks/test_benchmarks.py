import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks import _harness, _inputs, _peers, report
from benchmarks.__main__ import main
from benchmarks._records import read_records


TRIAL = replace(_harness.QUICK, rounds=2, calls=2)


def run_quickly(folder, *subjects):
    only = [word for subject in subjects for word in ("--only", subject)]
    assert main(["--quick", "--results", str(folder), *only]) == 0
    return read_records(folder.glob("*/*.jsonl"))


def test_a_quick_run_leaves_whole_records_and_a_page(tmp_path, capsys):
    records = run_quickly(tmp_path, "linear_recurrence", "layout")
    subjects = {"linear_recurrence", "selective_scan_layout"}
    assert {r["operation"] for r in records} == subjects
    assert len(records) >= 8
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


def test_an_implementation_that_cannot_serve_is_recorded_as_missing():
    def refuse():
        raise NotImplementedError("no compiler")

    contender = _harness.Contender("cpu", refuse)
    entries = _harness.entries({"name": "tiny"}, [contender], lambda: None)
    (measurement,) = _harness.race(TRIAL, "selective_scan", "forward", entries)
    assert (measurement.status, measurement.reason) == ("missing", "no compiler")


def test_one_that_needs_too_much_memory_is_left_out():
    def refuse():
        raise _harness.TooLarge("it needs 16 GiB")

    contender = _harness.Contender("xla", refuse)
    entries = _harness.entries({"name": "tiny"}, [contender], lambda: None)
    (measurement,) = _harness.race(TRIAL, "attention", "forward", entries)
    assert (measurement.status, measurement.reason) == ("left out", "it needs 16 GiB")


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"schema": 0})])
def test_a_file_that_holds_no_records_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="records.jsonl:1"):
        read_records([path])
