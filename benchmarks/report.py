"""`python -m benchmarks.report`: write docs/benchmarks.md from the newest records."""

import argparse
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import (
    causal_conv,
    decode,
    layer_memory,
    layout,
    linear_recurrence,
    scaling,
    second_order,
    selective_scan,
)
from ._bars import NAMES
from ._environment import RESULTS, ROOT
from ._records import MEASURED, read_records


DOCUMENT = ROOT / "docs" / "benchmarks.md"

_SUBJECTS = (
    selective_scan,
    scaling,
    layer_memory,
    decode,
    layout,
    linear_recurrence,
    causal_conv,
    second_order,
)
_INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.report` from the records under `benchmarks/results`,
which `make bench` adds to: every figure here has its record. Do not edit this page.

Contenders take turns within one process, so that the noise of a shared machine hits all
alike; times are medians, without the first call. *Error* is the largest difference from
a float64 NumPy reference in units of the largest value of that output; *temporaries* is
what XLA allocates beside arguments and results. float32 throughout.
"""

Record = dict[str, Any]


def render(records: Iterable[Record]) -> str:
    """The page for some records, one chapter a device.

    **Arguments:**

    - `records`: the oldest first; a later one replaces an earlier one of the same name.

    **Raises:**

    `ValueError` if there are none.
    """
    devices: dict[str, list[Record]] = {}
    for record in records:
        devices.setdefault(record["device"]["kind"], []).append(record)
    if not devices:
        raise ValueError(
            "no records to report: run `make bench` first. Records of --quick count "
            "only if you ask for them with --quick."
        )
    chapters = [_chapter(devices[kind]) for kind in sorted(devices)]
    return "\n".join([_INTRODUCTION, *chapters])


def _chapter(records: Sequence[Record]) -> str:
    measurements = _newest(
        (r for r in records if r["kind"] == "measurement"),
        ("operation", "mode", "implementation"),
    )
    # In the order of the claims; one that is no longer made is left out.
    found = _newest((r for r in records if r["kind"] == "bar"), ("name",))
    found = [bar for bar in found if bar["name"] in NAMES]
    bars = sorted(found, key=lambda bar: NAMES.index(bar["name"]))
    machine = records[-1]["device"]
    lines = [
        f"## {machine['model']}, {machine['cores']} cores",
        "",
        *_provenance(measurements),
    ]
    if bars:
        lines += ["### Bars", "", *_bar_table(bars)]
    for subject in _SUBJECTS:
        own = [m for m in measurements if m["operation"] == subject.OPERATION]
        if own:
            lines += _section(inspect.getdoc(subject) or "", own)
    return "\n".join(lines)


def _newest(records: Iterable[Record], names: Sequence[str]) -> list[Record]:
    """The last record of each name and shape, in the order of their first."""
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        spec = record.get("spec", {}).get("name", "")
        found[spec, *(record[name] for name in names)] = record
    return list(found.values())


def _provenance(measurements: Sequence[Record]) -> list[str]:
    """One line a run that figures come from."""
    runs: dict[str, list[Record]] = {}
    for measurement in measurements:
        runs.setdefault(measurement["run"], []).append(measurement)
    lines = []
    for run, members in sorted(runs.items()):
        first = members[0]
        commit = (first["commit"] or "unknown")[:10]
        state = " with changes" if first["dirty"] else ""
        versions = ", ".join(
            f"{name} {version or 'absent'}"
            for name, version in first["versions"].items()
        )
        loads = [m["load_of_others"] for m in members]
        loads = [load for load in loads if load is not None]
        load = ""
        if loads:
            load = (
                f" Other processes used {min(loads):.0%} to {max(loads):.0%} of the "
                "machine meanwhile."
            )
        lines.append(
            f"- {run}, commit `{commit}`{state}: {len(members)} measurements with "
            f"{versions}.{load}"
        )
    return [*lines, ""]


def _bar_table(bars: Sequence[Record]) -> list[str]:
    rows = []
    for bar in bars:
        relation = "at least" if bar["at_least"] else "at most"
        wanted = f"{relation} {bar['limit']:.3g} {bar['unit']}"
        verdict = "met" if bar["passed"] else "**missed**"
        rows.append([bar["statement"], wanted, f"{bar['value']:.3g}", verdict])
    return _table(["claim", "wanted", "measured", ""], "lrrl", rows)


def _section(text: str, measurements: Sequence[Record]) -> list[str]:
    title, _, rest = text.partition("\n")
    lines = [f"### {title.rstrip('.')}", ""]
    if rest.strip():
        lines += [rest.strip(), ""]
    specs: dict[str, list[Record]] = {}
    for measurement in measurements:
        specs.setdefault(measurement["spec"]["name"], []).append(measurement)
    if all(len({m["implementation"] for m in own}) == 1 for own in specs.values()):
        # Nothing to compare within a shape: the shapes themselves are the rows.
        return lines + _measurement_table(measurements, by_spec=True)
    for own in specs.values():
        sizes = [f"{k} {v}" for k, v in own[0]["spec"].items() if k != "name"]
        lines += [f"`{own[0]['spec']['name']}`: {', '.join(sizes)}", ""]
        lines += _measurement_table(own, by_spec=False)
    return lines


def _measurement_table(measurements: Sequence[Record], *, by_spec: bool) -> list[str]:
    """Times beside that of the first of the same mode, or of the row before."""
    base: dict[str, float] = {}
    rows = []
    peaks = any(m["peak_rss_bytes"] is not None for m in measurements)
    for m in measurements:
        name = m["spec"]["name"] if by_spec else m["implementation"]
        head = [m["mode"].replace("_", " "), f"`{name}`"]
        if m["status"] != MEASURED:
            rows.append([*head, f"{m['status']}: {m['reason']}"])
            continue
        median = m["median_ms"]
        ratio = median / base.get(m["mode"], median)
        if by_spec or m["mode"] not in base:
            base[m["mode"]] = median
        row = [*head, f"{median:.4g}", f"{ratio:.2f}"]
        row += [_mebibytes(m["temp_bytes"]), _seconds(m["compile_ms"])]
        if peaks:
            row.append(_mebibytes(m["peak_rss_bytes"]))
        rows.append([*row, f"{m['max_error']:.1e}", str(len(m["evaluation_ms"]))])
    what = "of the row above" if by_spec else "of the first"
    titles = ["mode", "shape" if by_spec else "implementation", "ms", what]
    titles += ["temporaries, MiB", "compile, s"]
    titles += ["peak resident, MiB"] if peaks else []
    titles += ["error", "calls"]
    return _table(titles, "ll" + "r" * (len(titles) - 2), rows)


def _table(titles: list[str], align: str, rows: list[list[str]]) -> list[str]:
    marks = [{"l": "---", "r": "---:"}[side] for side in align]
    full = [row + [""] * (len(titles) - len(row)) for row in rows]
    return [f"| {' | '.join(row)} |" for row in [titles, marks, *full]] + [""]


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def _seconds(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds / 1e3:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all records, write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Write docs/benchmarks.md."
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    parser.add_argument(
        "--quick", action="store_true", help="use the records of trials instead"
    )
    options = parser.parse_args(arguments)
    records = read_records(sorted(options.results.glob("*/*.jsonl")))
    page = render(r for r in records if r["quick"] == options.quick)
    options.output.write_text(page, "utf-8")
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
