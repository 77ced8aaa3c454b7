import argparse

from ..kernels import implementations
from ..models import model_cost
from ..train import RunConfig, RunFolder, build_model, load_model
from ..transforms import report
from ._console import Console, show_cost, show_references
from ._quantize import show_losses, show_report


def run_info(arguments: argparse.Namespace) -> int:
    """`capibara info`."""
    console = Console()
    if arguments.kernels:
        _show_kernels(console)
    if arguments.run is not None:
        _show_run(console, arguments)
    elif not arguments.kernels:
        raise ValueError("name a run folder, or pass --kernels")
    return 0


def _show_kernels(console: Console) -> None:
    rows = [
        (
            found.operation,
            found.name,
            "yes" if found.is_default else "",
            "runs here" if found.reason is None else found.reason,
        )
        for found in implementations()
    ]
    columns = ("operation", "implementation", "default", "")
    console.table("kernels", columns, rows, justify="left")


def _show_run(console: Console, arguments: argparse.Namespace) -> None:
    run, config = RunFolder.open(arguments.run)
    show_cost(console, model_cost(build_model(config)))
    if run.compression_path.exists():
        _show_compression(console, run, config)
        return
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


def _show_compression(console: Console, run: RunFolder, config: RunConfig) -> None:
    facts = run.read_compression()
    show_report(console, report(load_model(run, config)))
    show_losses(console, facts["before"], facts["after"])
