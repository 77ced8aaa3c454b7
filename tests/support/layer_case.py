"""What the contract tests know of a layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from support.rows import LENGTH


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of the contract suite.

    `width` is the size of the input's last axis. `terms` is about how many terms the
    longest sum that makes an output has. `padding` is what the output holds where the
    input is padding: "zero", "input" (a residual stream), or "any" (scores).
    `cache_axes` is the number of layer axes in front of a cache's batch axes.
    `remembers` is false for a mixer whose output depends on the current token alone.
    `axes` are those that a layer which is no mixer reads together. `roundings` is how
    often a value is rounded on its way through, between layers and between the parts of
    one, if not 16 times in a mixer and twice in another layer. `exact` is false for a
    mixer that reads a row by Fourier transforms, whose rounding reaches every token.
    `fitted` are arrays that decide something, and have no gradient for it.
    """

    name: str
    make: Callable[..., Any]
    width: int
    terms: int
    mixer: bool = True
    tokens: bool = False
    padding: str = "zero"
    cache_axes: int = 0
    remembers: bool = True
    axes: tuple[int, ...] = ()
    roundings: int | None = None
    exact: bool = True
    slow: bool = False
    fitted: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of one input, without that of `width`."""
        return self.axes or (LENGTH,)

    @property
    def kinds(self) -> set[str]:
        if not self.mixer:
            return {"pointwise"}
        return {"mixer", "memory"} if self.remembers else {"mixer"}
