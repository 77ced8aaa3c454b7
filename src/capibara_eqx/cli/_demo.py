import argparse
import time

from ..train import SineConfig, SineFolder
from ._adapt import compare
from ._console import Console
from ._settings import given_settings
from ._train import run_train


_ITERATIONS = 1500


def run_demo(arguments: argparse.Namespace) -> int:
    """`capibara demo`: a language model, then a model that learns to adapt."""
    arguments.out = arguments.out or time.strftime("runs/%Y%m%d-%H%M%S")
    code = run_train(arguments)
    if code != 0:
        return code
    seed = given_settings(arguments).get("seed", 0)
    methods = ("random", "joint", "maml")
    config = SineConfig(iterations=_ITERATIONS, seed=seed, methods=methods)
    return compare(Console(), SineFolder(arguments.out), config)
