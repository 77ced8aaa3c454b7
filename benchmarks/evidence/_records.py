"""Records: one JSON line a trained model, in one file an experiment."""

import dataclasses
import datetime
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._environment import ROOT, Load, commit, device, versions
from .._records import SCHEMA
from .._tables import Record


KIND = "trained"
FOLDER = ROOT / "benchmarks" / "results" / "evidence"


@dataclass(frozen=True)
class Outcome:
    """What one model had learned, from one seed.

    `settings` is all that the experiment was given, `parameters` the number of trained
    numbers, `results` what was measured at the end, `curve` what was measured while it
    trained, `example` what it made of an input, for a picture. `wall_s` is the time of
    all that, compilation and evaluation too.
    """

    model: str
    seed: int
    settings: dict[str, Any]
    parameters: int
    results: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    example: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    load_of_others: float | None = None


class Recorder:
    """Appends the outcomes of one run, each as soon as it is there.

    **Arguments:**

    - `folder`: of all records; the file is `<experiment>.jsonl`.
    - `quick`: marks the records as those of a trial, which no page quotes.
    - `run`: the name of the run that these records belong to; a new one by default.
    """

    def __init__(self, folder: Path, *, quick: bool, run: str | None = None):
        now = datetime.datetime.now(datetime.UTC)
        self._folder = folder
        # The commit is that of the start: a long run should not change it.
        self._common = {
            "kind": KIND,
            "schema": SCHEMA,
            "run": f"{now:%Y-%m-%dT%H:%M:%SZ}" if run is None else run,
            "quick": quick,
            **commit(),
            "device": device(),
            "versions": versions(),
        }

    def path(self, experiment: str) -> Path:
        return self._folder / f"{experiment}.jsonl"

    def record(self, experiment: str, outcome: Outcome) -> None:
        line = {**self._common, "experiment": experiment, **dataclasses.asdict(outcome)}
        path = self.path(experiment)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def last_run(records: Iterable[Record], experiment: str) -> list[Record]:
    """Of records, the oldest first, those of the last run of an experiment."""
    own = [r for r in records if r["experiment"] == experiment]
    return [r for r in own if r["run"] == own[-1]["run"]]


def timed(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The outcomes, each with the time that it took and what else ran meanwhile."""
    while True:
        start, before = time.perf_counter(), Load.now()
        outcome = next(outcomes, None)
        if outcome is None:
            return
        yield dataclasses.replace(
            outcome,
            wall_s=round(time.perf_counter() - start, 3),
            load_of_others=None if before is None else before.of_others(Load.now()),
        )
