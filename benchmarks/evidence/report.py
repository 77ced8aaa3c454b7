"""`python -m benchmarks.evidence.report`: write docs/evidence.md from the records."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from .._environment import ROOT
from .._records import read_records
from .._tables import Record, bar_table
from ._experiments import EXPERIMENTS
from ._records import FOLDER, last_run


DOCUMENT = ROOT / "docs" / "evidence.md"
_INTRODUCTION = """\
# Evidence

Written by `python -m benchmarks.evidence.report` from the records under
`benchmarks/results/evidence`: every figure here has its record. Do not edit this page.

Published results that tell these layers apart, repeated at a size that two processor
cores train in minutes. Records are made, one experiment after the other, by

```
make evidence                                        # all of them
make evidence ARGS="--only parity --only digits"
make evidence ARGS="--only omniglot --omniglot omniglot28.npz"
```

Omniglot is skipped without its file, which `meta.tasks.omniglot` describes. It takes
over three hours; with `--resume` an interrupted run leaves out what it has finished.

What was wanted stands beside what was measured, and what was missed stays here. The
wanted figures are published ones where the task is the published one in small.
"""


def render(records: Iterable[Record]) -> str:
    """The page for some records.

    **Arguments:**

    - `records`: the oldest first; a later run of an experiment replaces an earlier one.

    **Raises:**

    `ValueError` if there are none.
    """
    found = _newest(records)
    if not found:
        raise ValueError(
            "no records to report: run `make evidence` first. Records of --quick "
            "count only if you ask for them with --quick."
        )
    chapters = [_chapter(name, own) for name, own in found.items()]
    return "\n".join([_INTRODUCTION, *chapters])


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write the plots that the page of these records shows, and return their paths.

    **Arguments:**

    - `records`: as for `render`.
    - `folder`: of the page.
    """
    written = []
    for name, own in _newest(records).items():
        path = folder / _image(name)
        EXPERIMENTS[name].draw(own, path)
        written.append(path)
    return written


def _newest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each experiment's last run, in the order of the page."""
    records = list(records)
    newest = {name: last_run(records, name) for name in EXPERIMENTS}
    return {name: own for name, own in newest.items() if own}


def _image(name: str) -> str:
    """Where the plot of an experiment lies, seen from the page."""
    return f"images/evidence-{name}.svg"


def _chapter(name: str, records: Sequence[Record]) -> str:
    experiment = EXPERIMENTS[name]
    bars = [{**asdict(b), "passed": b.passed} for b in experiment.bars(records)]
    lines = [
        f"## {experiment.title}",
        "",
        experiment.introduction,
        "",
        *bar_table(bars),
        *experiment.tables(records),
        f"![{experiment.title}]({_image(name)})",
        "",
        *_provenance(records),
    ]
    return "\n".join(lines)


def _provenance(records: Sequence[Record]) -> list[str]:
    """Settings, machine, commit and versions, as they are in the records."""
    first = records[0]
    # A run that was interrupted may have gone on at another commit.
    commits = ", ".join(dict.fromkeys(_commit(r) for r in records))
    versions = ", ".join(
        f"{name} {first['versions'][name]}" for name in ("python", "jax", "equinox")
    )
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(r["seed"] for r in records))
    lines = [
        f"Run {first['run']}, commit {commits}, {first['device']['model']}, "
        f"{first['device']['cores']} cores, {versions}; seeds {seeds}."
    ]
    loads = [r["load_of_others"] for r in records if r["load_of_others"] is not None]
    if loads:
        lines.append(
            f"Other processes used {min(loads):.0%} to {max(loads):.0%} of the machine "
            "meanwhile."
        )
    settings = ", ".join(_settings(first["settings"]))
    return [" ".join(lines), "", f"Settings: {settings}.", ""]


def _commit(record: Record) -> str:
    state = " with changes" if record["dirty"] else ""
    return f"`{(record['commit'] or 'unknown')[:10]}`{state}"


def _settings(settings: Record) -> list[str]:
    found = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += _settings(value)
        elif name != "seeds":
            found.append(f"{name} {value}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all records, write the page and its plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.report",
        description="Write docs/evidence.md.",
    )
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    parser.add_argument(
        "--quick", action="store_true", help="use the records of trials instead"
    )
    options = parser.parse_args(arguments)
    records = read_records(sorted(options.results.glob("*.jsonl")))
    records = [r for r in records if r["quick"] == options.quick]
    page = render(records)
    drawn = draw(records, options.output.parent)
    options.output.write_text(page, "utf-8")
    for path in (options.output, *drawn):
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
