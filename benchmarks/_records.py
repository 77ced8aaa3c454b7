"""Records: one JSON line a measurement, in one file a device and day."""

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ._environment import commit, device, versions


SCHEMA = 1

# What speed and memory are recorded as.
KINDS = ("measurement", "bar")

MEASURED = "measured"
MISSING = "missing"
LEFT_OUT = "left out"


@dataclass(frozen=True)
class Measurement:
    """One implementation of one operation, at one shape and in one mode.

    `status` is `"measured"`, or says why there are no numbers, with the `reason`.
    `max_error` is the largest difference from a float64 reference, over the outputs,
    in units of the largest value of the output that it is in. `roofline_ms` is the
    least time that the device needs, `roofline_of` for what, or why it is not known.
    """

    operation: str
    implementation: str
    spec: dict[str, Any]
    mode: str
    status: str = MEASURED
    reason: str | None = None
    compile_ms: float | None = None
    evaluation_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    temp_bytes: int | None = None
    max_error: float | None = None
    peak_rss_bytes: int | None = None
    load_of_others: float | None = None
    roofline_ms: float | None = None
    roofline_of: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.operation, self.spec["name"], self.mode, self.implementation


@dataclass(frozen=True)
class Bar:
    """A speed or a size that the library claims, and what was measured."""

    name: str
    statement: str
    value: float
    limit: float
    at_least: bool
    unit: str

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Recorder:
    """Appends measurements and bars of one run to one file.

    **Arguments:**

    - `results`: folder of all records; the file is `<device kind>/<date>.jsonl`.
    - `quick`: marks the records as those of a trial, which no report quotes.
    """

    def __init__(self, results: Path, *, quick: bool):
        now = datetime.datetime.now(datetime.UTC)
        machine = device()
        self.path = results / machine["kind"] / f"{now:%Y-%m-%d}.jsonl"
        self._common = {
            "schema": SCHEMA,
            "run": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "quick": quick,
            **commit(),
            "device": machine,
            "versions": versions(),
        }

    def measurement(self, measurement: Measurement) -> None:
        self._append({"kind": "measurement", **self._common, **asdict(measurement)})

    def bar(self, bar: Bar) -> None:
        line = {**asdict(bar), "passed": bar.passed}
        self._append({"kind": "bar", **self._common, **line})

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All records of the files, the newest run last.

    **Raises:**

    `ValueError` for a line that is not a record of this schema, with file and line.
    """
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a JSON line: {error}") from None
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                raise ValueError(
                    f"{path}:{number}: not a record of schema {SCHEMA}; delete the "
                    "file, or read it with the version that wrote it."
                )
            records.append(record)
    return sorted(records, key=lambda record: record["run"])
