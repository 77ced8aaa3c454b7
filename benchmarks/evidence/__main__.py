"""`python -m benchmarks.evidence`: run experiments, print and record the results."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from .._environment import ROOT
from ._experiments import EXPERIMENTS
from ._records import FOLDER, Recorder, timed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, record, print; return 0 whatever was learned."""
    options = _parser().parse_args(arguments)
    folder = options.results
    if folder is None:
        # A trial leaves nothing among the records that the page quotes.
        folder = ROOT / ".cache" / "evidence" if options.quick else FOLDER
    recorder = Recorder(folder, quick=options.quick)
    for name in options.only or list(EXPERIMENTS):
        print(f"\n{name}", flush=True)
        for outcome in timed(EXPERIMENTS[name].run(options.quick)):
            recorder.record(name, outcome)
            found = f"{outcome.results}, {outcome.wall_s:.0f} s"
            print(f"  {outcome.model}, seed {outcome.seed}: {found}", flush=True)
        print(f"Recorded in {recorder.path(name)}", flush=True)
    return 0


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
    return parser


if __name__ == "__main__":
    # The times should be those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main())
