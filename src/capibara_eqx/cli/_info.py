import argparse

from ..models import model_cost
from ..train import RunFolder, build_model
from ._console import Console, show_cost, show_references


def run_info(arguments: argparse.Namespace) -> int:
    """`capibara info`."""
    console = Console()
    run, config = RunFolder.open(arguments.run)
    show_cost(console, model_cost(build_model(config)))
    summary = run.read_summary()
    if summary is not None:
        show_references(
            console, summary["heldout_bits_per_byte"], summary["references"]
        )
        console.say(
            f"{summary['steps']} steps in {summary['training_seconds']:.0f} s at "
            f"{summary['tokens_per_second']:,.0f} tokens/s."
        )
    else:
        console.say(
            "The run is not finished; continue it with `capibara train --resume "
            f"{run.path}`."
        )
    return 0
