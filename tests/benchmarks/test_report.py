from typing import Any

import pytest

from benchmarks import report
from benchmarks._bars import NAMES


DEVICE = {"kind": "a", "model": "b", "cores": 2}
MEASURED = {"status": "measured", "reason": None, "compile_ms": 1500.0}


def measurement(implementation, spec, ms, operation="copy", run="1", **fields):
    common = {"kind": "measurement", "device": DEVICE, "run": run, "mode": "forward"}
    common |= {"commit": "c" * 40, "dirty": False, "versions": {"jax": "1"}}
    common |= {"load_of_others": None, "peak_rss_bytes": None, "max_error": 1e-7}
    own = {"operation": operation, "implementation": implementation, "spec": spec}
    own |= {"median_ms": ms, "evaluation_ms": [ms], "temp_bytes": 2**20}
    return {**common, **MEASURED, **own, **fields}


def test_the_page_shows_the_claims_that_are_made_in_their_order():
    def bar(name):
        measured = {"limit": 2.0, "at_least": True, "unit": "times", "value": 3.0}
        verdict = {"passed": True, "statement": f"statement of {name}"}
        return {"kind": "bar", "name": name, "device": DEVICE, **measured, **verdict}

    page = report.render(bar(name) for name in ("retired", *reversed(NAMES)))
    assert "statement of retired" not in page
    places = [page.index(f"statement of {name} ") for name in NAMES]
    assert places == sorted(places)


def test_the_last_run_of_a_subject_replaces_the_one_before():
    spec = {"name": "s"}
    records = [
        measurement("gone", spec, 1.25, run="1"),
        measurement("kept", spec, 2.25, run="1"),
        measurement("kept", spec, 3.25, run="2"),
        measurement("other", spec, 4.25, operation="causal_conv", run="1"),
    ]
    page = report.render(records)
    assert "| 3.25 |" in page
    assert "| 4.25 |" in page
    assert "gone" not in page
    assert "2.25" not in page


def test_rates_follow_from_the_work_of_a_call():
    spec = {"name": "s", "bytes_per_call": 3 * 10**9}
    page = report.render([measurement("probe", spec, 500.0)])
    assert "| GB/s |" in page
    assert "| 6 |" in page


def lengths():
    for implementation, factor in (("cpu", 1.0), ("xla", 4.0)):
        for seq in (2048, 4096, 8192):
            spec = {"name": f"{seq}_tokens", "seq": seq}
            absent: dict[str, Any] = {}
            if (implementation, seq) == ("xla", 8192):
                absent = {"status": "left out", "reason": "too long"}
                absent |= {"median_ms": None, "temp_bytes": None, "max_error": None}
            yield measurement(
                *(implementation, spec, factor * seq / 1024),
                operation="selective_scan_scaling",
                **absent,
            )


def test_lengths_are_shown_as_a_plot_and_a_table(tmp_path):
    records = list(lengths())
    page = report.render(records)
    assert "](images/scaling-a.svg)" in page
    assert "| 2048 | 2 | 8 |" in page
    assert "| 8192 | 8 | - |" in page
    assert "- A dash: `xla` is left out: too long." in page
    (path,) = report.draw(records, tmp_path)
    assert path == tmp_path / "images" / "scaling-a.svg"
    drawing = path.read_text()
    # Time grows with the length, memory does not.
    assert "cpu: slope 1.00" in drawing
    assert "xla: slope 1.00" in drawing
    assert "cpu: slope 0.00" in drawing or "cpu: slope -0.00" in drawing


def test_a_plot_is_the_same_whenever_it_is_drawn(tmp_path):
    records = list(lengths())
    (first,) = report.draw(records, tmp_path / "first")
    (second,) = report.draw(records, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def test_a_page_without_lengths_has_no_plot(tmp_path):
    assert report.draw([measurement("probe", {"name": "s"}, 1.0)], tmp_path) == []
    with pytest.raises(ValueError, match="make bench"):
        report.render([])
