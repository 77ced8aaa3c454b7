from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np


T = TypeVar("T")
_REQUIRED: Any = object()


class Entries:
    """Reads typed entries of a JSON object, and collects what is wrong with them.

    An entry that is wrong is taken as 1, so that the others are read too; what was
    read counts only while `problems` is empty. An entry that is null is absent.
    """

    def __init__(
        self, entries: Mapping[str, Any], problems: list[str], where: str = "config"
    ):
        self._entries = entries
        self._where = where
        self.problems = problems

    def refuse(self, problem: str) -> None:
        self.problems.append(f"{self._where}: {problem}")

    def get(self, name: str) -> Any:
        return self._entries.get(name)

    def has(self, name: str) -> bool:
        """Whether the entry is there, be it null."""
        return name in self._entries

    def size(self, name: str, default: T = _REQUIRED) -> int | T:
        return self._read(
            name,
            default,
            "a positive integer",
            lambda value: isinstance(value, int) and value >= 1,
        )

    def number(
        self, name: str, default: T = _REQUIRED, above: int | float = -np.inf
    ) -> float | T:
        what = "a number" if above == -np.inf else f"a number above {above}"
        value = self._read(
            name,
            default,
            what,
            lambda value: isinstance(value, int | float) and above < value < np.inf,
        )
        # The same value whichever way it was written.
        return value if value is default else float(cast(float, value))

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return bool(default if value is None else value)
        self.refuse(f"`{name}` must be true or false, got {value!r}")
        return default

    def interval(self, name: str, default: tuple[float, float]) -> tuple[float, float]:
        """Two numbers, the second of which may be infinity."""
        value = self.get(name)
        if value is None:
            return default
        pair = isinstance(value, list | tuple) and len(value) == 2
        low, high = map(_number, value) if pair else (None, None)
        if low is None or high is None or not low <= high:
            self.refuse(f"`{name}` must be two ascending numbers, got {value!r}")
            return default
        return low, high

    def section(self, name: str) -> "Entries | None":
        """The object under `name`, `None` if it is absent or empty."""
        value = self.get(name)
        if isinstance(value, Mapping):
            where = f"{self._where}, `{name}`"
            return Entries(value, self.problems, where) if value else None
        if value is not None:
            self.refuse(f"`{name}` must be an object, got {value!r}")
        return None

    def _read(self, name, default, what, fits):
        value = self.get(name)
        if value is None:
            if default is not _REQUIRED:
                return default
            self.refuse(f"`{name}` is missing")
            return 1
        if isinstance(value, bool) or not fits(value):
            self.refuse(f"`{name}` must be {what}, got {value!r}")
            return 1
        return value


def encode_number(value: float) -> Any:
    """What JSON holds for a number: infinity in the way of transformers 5."""
    return {"__float__": "Infinity"} if value == np.inf else value


def _number(value: Any) -> float | None:
    """A number, infinity in the way of transformers 5 too, which JSON has none for."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    infinite = isinstance(value, Mapping) and value.get("__float__") == "Infinity"
    return np.inf if infinite else None
