"""`python -m benchmarks.evidence`: run experiments, print and record the results."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from .._environment import ROOT
from .._records import read_records
from .._tables import Record
from . import omniglot
from ._experiments import EXPERIMENTS
from ._records import FOLDER, Outcome, Recorder, last_run, timed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, record, print; return 0 whatever was learned."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.resume and options.only != [omniglot.NAME]:
        parser.error("--resume goes with --only omniglot alone: the rest is short.")
    folder = options.results
    if folder is None:
        # A trial leaves nothing among the records that the page quotes.
        folder = ROOT / ".cache" / "evidence" if options.quick else FOLDER
    begun = _begun(folder, options)
    run = begun[-1]["run"] if begun else None
    recorder = Recorder(folder, quick=options.quick, run=run)
    for name in options.only or list(EXPERIMENTS):
        print(f"\n{name}", flush=True)
        if name == omniglot.NAME and options.omniglot is None:
            print("  Skipped: its data come with no package; see --omniglot.")
            continue
        for outcome in timed(_outcomes(name, options, begun)):
            recorder.record(name, outcome)
            found = f"{outcome.results}, {outcome.wall_s:.0f} s"
            print(f"  {outcome.model}, seed {outcome.seed}: {found}", flush=True)
        print(f"Recorded in {recorder.path(name)}", flush=True)
    return 0


def _begun(folder: Path, options: argparse.Namespace) -> list[Record]:
    """The records of the run to go on with, if any."""
    if not options.resume:
        return []
    records = read_records(sorted(folder.glob("*.jsonl")))
    records = [r for r in records if r["quick"] == options.quick]
    return last_run(records, omniglot.NAME)


def _outcomes(
    name: str, options: argparse.Namespace, begun: Sequence[Record]
) -> Iterator[Outcome]:
    run = EXPERIMENTS[name].run
    if name == omniglot.NAME:
        return run(options.quick, options.omniglot, begun)
    return run(options.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description="Train small models on tasks that tell layers apart.",
        epilog="python -m benchmarks.evidence.report then writes docs/evidence.md.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, a few steps: a trial"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(EXPERIMENTS),
        help="this experiment alone; may be given several times",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of the records (default {FOLDER.relative_to(ROOT)})",
    )
    parser.add_argument(
        "--omniglot",
        type=Path,
        metavar="PATH",
        help="an .npz file as for `meta.tasks.omniglot`; without it that experiment is "
        "skipped",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run of --only omniglot, which takes hours: learners "
        "that had their time are left out",
    )
    return parser


if __name__ == "__main__":
    # The times should be those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main())
