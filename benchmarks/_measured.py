"""Measurements by name, for what is computed from them."""

from collections.abc import Iterable

from ._records import Measurement


class Unmeasured(Exception):
    """A claim's figures are not among the measurements."""


class Measured:
    """Measurements of one run by name; `Unmeasured` for those that are not there."""

    def __init__(self, measurements: Iterable[Measurement]):
        self._by_key = {m.key: m for m in measurements}

    def get(self, operation: str, spec: str, mode: str, name: str) -> Measurement:
        if (operation, spec, mode, name) not in self._by_key:
            raise Unmeasured
        return self._by_key[operation, spec, mode, name]

    def ms(self, operation: str, spec: str, mode: str, name: str) -> float:
        return there(self.get(operation, spec, mode, name).median_ms)

    def of(self, operation: str, mode: str, name: str) -> list[Measurement]:
        wanted = (operation, mode, name)
        found = self._by_key.values()
        return [m for m in found if (m.operation, m.mode, m.implementation) == wanted]


def there(value: float | None) -> float:
    """The value, `Unmeasured` if there is none."""
    if value is None:
        raise Unmeasured
    return value
