"""The experiments, in the order of the page."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .._records import Bar
from .._tables import Record
from . import (
    compressed_language,
    compression,
    digits,
    few_shot_digits,
    induction_heads,
    linear_system,
    omniglot,
    parity,
    selective_copying,
    sinusoid,
)
from ._records import Outcome


@dataclass(frozen=True)
class Experiment:
    """How to run it, and what the page says of its records.

    `run` takes whether it is a trial, and the file of the data if they are no part of a
    package. `introduction` and `title` stand above what `tables` returns, and the
    picture of `draw`; `bars` compares with what is expected.
    """

    title: str
    introduction: str
    run: Callable[..., Iterator[Outcome]]
    tables: Callable[[Sequence[Record]], list[str]]
    bars: Callable[[Sequence[Record]], Iterator[Bar]]
    draw: Callable[[Sequence[Record], Path], None]


def _experiment(module: ModuleType) -> Experiment:
    parts = (module.run, module.tables, module.bars, module.draw)
    return Experiment(module.TITLE, (module.__doc__ or "").strip(), *parts)


EXPERIMENTS = {
    module.NAME: _experiment(module)
    for module in (
        *(selective_copying, induction_heads, parity),
        *(digits, compression, compressed_language, linear_system),
        *(sinusoid, few_shot_digits, omniglot),
    )
}
