import argparse
import logging
from collections.abc import Sequence

from .. import __version__
from ..internal import require_extra
from ..train import NonFiniteLossError, SineConfig
from ._adapt import run_adapt
from ._console import fail
from ._demo import run_demo
from ._generate import run_generate
from ._info import run_info
from ._quantize import run_quantize
from ._settings import add_settings, byte_or_none
from ._train import run_train


# So short a training wants a higher rate than a long one (bits per byte after the 3280
# steps that two cores take in 90 s: 1.497 at 5e-3, 1.472 at 8e-3, 1.480 at 1.2e-2), but
# no fewer states: with 2 of them 4000 steps in the same time came to 1.488.
_DEMO = {"seconds": 90.0, "learning_rate": 8e-3}
_TRAIN = {"seconds": 90.0}


def main(argv: Sequence[str] | None = None) -> int:
    """The `capibara` command.

    **Arguments:**

    - `argv`: its arguments; those of the process if not given.

    **Returns:**

    The exit code: 0, 1 for an error or a failed check, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    # Orbax logs a traceback of its own before it raises; the message says enough.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        # Before anything is written: what a command needs must be there at its end.
        for module in arguments.needs:
            require_extra(module, "train")
        return arguments.run_command(arguments)
    except (ImportError, OSError, ValueError, NonFiniteLossError) as error:
        return fail(_message(error))
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capibara",
        description="Train, sample and inspect byte-level Mamba language models; "
        "compare ways to learn to adapt.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on Python's own library for 90 seconds and show what comes out; "
        "then learn to adapt to sines",
    )
    demo.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/DATE)")
    add_settings(demo, _DEMO)
    demo.set_defaults(run_command=run_demo, resume=None, defaults=_DEMO)

    train = commands.add_parser(
        "train", help="train on a text file or folder, or continue a run"
    )
    source = train.add_mutually_exclusive_group()
    source.add_argument(
        "--out", metavar="FOLDER", help="run folder (default: runs/DATE)"
    )
    source.add_argument("--resume", metavar="RUN", help="run folder to continue")
    add_settings(train, _TRAIN)
    train.set_defaults(run_command=run_train, defaults=_TRAIN)

    generate = commands.add_parser("generate", help="continue a prompt")
    _add_generate(generate)

    quantize = commands.add_parser(
        "quantize", help="compress the model of a run and score what it costs"
    )
    quantize.add_argument("run", metavar="RUN", help="run folder")
    quantize.add_argument(
        "--rules",
        metavar="FILE",
        required=True,
        help="TOML: one table [[rule]] of pattern and spec for each kind of weight",
    )
    quantize.add_argument(
        "--out", metavar="FOLDER", help="new run folder (default: RUN-quantized)"
    )
    quantize.set_defaults(run_command=run_quantize, needs=("rich", "orbax.checkpoint"))

    adapt = commands.add_parser(
        "adapt",
        help="learn to adapt: MAML and others on sines, against joint training",
    )
    _add_adapt(adapt)

    info = commands.add_parser(
        "info", help="show the model of a run and its result, or the kernels"
    )
    info.add_argument("run", metavar="RUN", nargs="?", help="run folder")
    info.add_argument(
        "--kernels",
        action="store_true",
        help="which implementations of the kernels run here, or why not",
    )
    info.set_defaults(run_command=run_info)

    for command in (demo, train):
        command.set_defaults(needs=("rich", "matplotlib", "orbax.checkpoint"))
    generate.set_defaults(needs=("rich", "orbax.checkpoint"))
    info.set_defaults(needs=("rich",))
    return parser


def _add_adapt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="FOLDER", help="new folder (default: runs/DATE)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=SineConfig.iterations,
        metavar="N",
        help=f"training steps of every method (default: {SineConfig.iterations})",
    )
    parser.add_argument(
        "--shots",
        type=int,
        default=SineConfig.shots,
        metavar="K",
        help=f"examples of a new sine (default: {SineConfig.shots})",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and tasks (default: 0)"
    )
    parser.set_defaults(run_command=run_adapt, needs=("rich", "matplotlib"))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--prompt", default="def ", help="text to continue (default: 'def ')"
    )
    parser.add_argument(
        "--max-new-bytes",
        type=int,
        default=200,
        metavar="N",
        help="most bytes to add (default: 200)",
    )
    parser.add_argument("--greedy", action="store_true", help="always the best byte")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="above 1 more varied, below 1 less (default: 0.7)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="of the K best only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="of the smallest set of probability P"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--stop-byte",
        type=byte_or_none,
        default=0,
        metavar="BYTE|none",
        help="ends the text, 0 to 255; none: always N bytes (default: 0, which "
        "stands between the files of a corpus)",
    )
    parser.set_defaults(run_command=run_generate)
