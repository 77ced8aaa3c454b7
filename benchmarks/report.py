"""`python -m benchmarks.report`: write docs/benchmarks.md from the newest records."""

import argparse
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import (
    attention,
    causal_conv,
    cores,
    decode,
    demo_speed,
    gptq,
    gpu,
    layer,
    layer_memory,
    layout,
    linear_recurrence,
    llama_decode,
    machine,
    mamba2_decode,
    meta_mamba,
    meta_memory,
    meta_step,
    moe,
    one_token,
    quant_matmul,
    s4d,
    scaling,
    second_order,
    selective_scan,
    sequence_parallel,
    ssd,
)
from ._bars import NAMES
from ._environment import RESULTS, ROOT
from ._plots import plot_lengths
from ._records import KINDS, read_records
from ._tables import Record, bar_table, exchange_table, length_tables, tables


DOCUMENT = ROOT / "docs" / "benchmarks.md"

_SUBJECTS = (
    machine,
    selective_scan,
    cores,
    scaling,
    second_order,
    one_token,
    decode,
    ssd,
    mamba2_decode,
    s4d,
    layer,
    layer_memory,
    demo_speed,
    layout,
    linear_recurrence,
    causal_conv,
    attention,
    llama_decode,
    moe,
    quant_matmul,
    gptq,
    sequence_parallel,
    meta_step,
    meta_memory,
    meta_mamba,
)
# What stands above the tables of each operation, in the order of the page.
_HEADINGS = {
    **{subject.OPERATION: inspect.getdoc(subject) or "" for subject in _SUBJECTS},
    **gpu.HEADINGS,
}
_INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.report` from the records under `benchmarks/results`,
which `make bench` adds to: every figure here has its record. Do not edit this page.

Contenders take turns within one process, so that the noise of a shared machine hits all
alike; times are medians, without the first call of each turn unless that takes a second
or more. *Error* is the largest difference from a float64 NumPy reference in units of
the largest value of that output; *temporaries* is what XLA, or PyTorch, allocates
beside arguments and results. float32, but where a heading says otherwise.
"""


def render(records: Iterable[Record]) -> str:
    """The page for some records, one chapter a device.

    **Arguments:**

    - `records`: the oldest first; a later run of a subject replaces an earlier one.

    **Raises:**

    `ValueError` if there are none.
    """
    devices = _by_device(records)
    if not devices:
        raise ValueError(
            "no records to report: run `make bench` first. Records of --quick count "
            "only if you ask for them with --quick."
        )
    chapters = [_chapter(kind, devices[kind]) for kind in sorted(devices)]
    return "\n".join([_INTRODUCTION, *chapters])


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write the plots that the page of these records shows.

    **Arguments:**

    - `records`: as for `render`.
    - `folder`: of the page.

    **Returns:**

    The files.
    """
    written = []
    for kind, own in _by_device(records).items():
        lengths = [m for m in _newest(own) if m["operation"] == scaling.OPERATION]
        if lengths:
            path = folder / _image(kind)
            plot_lengths(path, lengths)
            written.append(path)
    return written


def _by_device(records: Iterable[Record]) -> dict[str, list[Record]]:
    devices: dict[str, list[Record]] = {}
    for record in records:
        devices.setdefault(record["device"]["kind"], []).append(record)
    return devices


def _image(kind: str) -> str:
    """Where the plot of a device lies, seen from the page."""
    return f"images/scaling-{kind}.svg"


def _chapter(kind: str, records: Sequence[Record]) -> str:
    measurements = _newest(records)
    # In the order of the claims; one that is no longer made is left out.
    found = {r["name"]: r for r in records if r["kind"] == "bar"}
    bars = [found[name] for name in NAMES if name in found]
    machine = records[-1]["device"]
    lines = [
        f"## {machine['model']}, {machine['cores']} cores",
        "",
        *_provenance(measurements),
    ]
    if bars:
        lines += ["### Bars", "", *bar_table(bars)]
    for operation, heading in _HEADINGS.items():
        own = [m for m in measurements if m["operation"] == operation]
        if not own:
            continue
        lines += _heading(heading)
        if operation == scaling.OPERATION:
            lines += [f"![Time and memory against length]({_image(kind)})", ""]
            lines += length_tables(own)
        elif operation == sequence_parallel.OPERATION:
            lines += exchange_table(own)
        else:
            lines += tables(own)
    return "\n".join(lines)


def _newest(records: Sequence[Record]) -> list[Record]:
    """The measurements of the last run of each operation: ratios are of one run."""
    measurements = [r for r in records if r["kind"] == "measurement"]
    runs = {m["operation"]: m["run"] for m in measurements}
    return [m for m in measurements if m["run"] == runs[m["operation"]]]


def _provenance(measurements: Sequence[Record]) -> list[str]:
    """One line a run that figures come from."""
    runs: dict[str, list[Record]] = {}
    for measurement in measurements:
        runs.setdefault(measurement["run"], []).append(measurement)
    return [*(_run_line(run, members) for run, members in sorted(runs.items())), ""]


def _run_line(run: str, members: Sequence[Record]) -> str:
    first = members[0]
    commit = (first["commit"] or "unknown")[:10]
    state = " with changes" if first["dirty"] else ""
    versions = ", ".join(
        f"{name} {version or 'absent'}" for name, version in first["versions"].items()
    )
    loads = [m["load_of_others"] for m in members]
    loads = [load for load in loads if load is not None]
    load = ""
    if loads:
        load = (
            f" Other processes used {min(loads):.0%} to {max(loads):.0%} of the "
            "machine meanwhile."
        )
    return (
        f"- {run}, commit `{commit}`{state}: {len(members)} measurements with "
        f"{versions}.{load}"
    )


def _heading(text: str) -> list[str]:
    title, _, rest = text.partition("\n")
    lines = [f"### {title.rstrip('.')}", ""]
    return [*lines, rest.strip(), ""] if rest.strip() else lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all records, write the page and its plots."""
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
    # Beside them lie the records of `benchmarks.evidence`, which has its own page.
    records = [r for r in records if r["kind"] in KINDS]
    records = [r for r in records if r["quick"] == options.quick]
    page = render(records)
    drawn = draw(records, options.output.parent)
    options.output.write_text(page, "utf-8")
    for path in (options.output, *drawn):
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
