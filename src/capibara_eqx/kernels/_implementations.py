from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _backends
from ._attention import api as attention
from ._causal_conv import api as causal_conv
from ._dispatch import check_names
from ._experts import api as experts
from ._linear_recurrence import api as linear_recurrence
from ._quant_matmul import api as quant_matmul
from ._selective_scan import api as selective_scan
from ._ssd import api as ssd


_OPERATIONS: Mapping[str, Any] = {
    "selective_scan": selective_scan,
    "linear_recurrence": linear_recurrence,
    "ssd": ssd,
    "causal_conv": causal_conv,
    "experts": experts,
    "attention": attention,
    "quant_matmul": quant_matmul,
}


class Implementation(NamedTuple):
    """One way to run an operation, on the platform that jax runs on.

    - `operation`, `name`: `name` is what `implementation` takes.
    - `reason`: why it cannot run here, `None` if it can.
    - `is_default`: whether it runs if none is named and the case is one of its own.

    !!! example

        ```python
        defaults = {x.operation: x.name for x in implementations() if x.is_default}
        ```
    """

    operation: str
    name: str
    reason: str | None
    is_default: bool


def implementations() -> list[Implementation]:
    """Every implementation of every operation, and whether it can run here.

    May compile what has not been compiled yet, which takes some seconds.

    !!! example

        ```python
        for found in implementations():
            print(found.operation, found.name, found.reason or "runs here")
        ```
    """
    found = []
    for operation, api in _OPERATIONS.items():
        reasons = {name: _reason(api, name) for name in api.BACKENDS}
        serving = [name for name, reason in reasons.items() if reason is None]
        own = _backends.PLATFORMS.get(_backends.platform())
        default = own if own in serving else getattr(api, "DEFAULT", "xla")
        found += [
            Implementation(operation, name, reason, name == default)
            for name, reason in reasons.items()
        ]
    return found


def check_implementation(implementation: str | None, *operations: str) -> None:
    """For a layer that keeps the name until it is called: is there one of that name?

    **Arguments:**

    - `implementation`: a name, or `None` for the default.
    - `operations`: names of operations that will get it.

    **Raises:**

    `ValueError` if one of them has no such implementation; whether it can run here is
    seen when it is called.

    !!! example

        ```python
        check_implementation("reference", "selective_scan", "causal_conv")
        ```
    """
    if implementation is None:
        return
    if not isinstance(implementation, str):
        raise ValueError(
            "`implementation` of a layer must be one name, or None for the default; "
            f"got {implementation!r}."
        )
    for operation in operations:
        check_names(operation, (implementation,), _OPERATIONS[operation].BACKENDS)


def _reason(api: Any, name: str) -> str | None:
    if name in getattr(api, "REASONS", {}):
        return api.REASONS[name]()
    by_name = {kernel: key for key, kernel in _backends.PLATFORMS.items()}
    if name not in by_name:
        return None
    if by_name[name] != _backends.platform():
        return f"runs on {by_name[name]}; jax runs on {_backends.platform()} here"
    return _backends.load(api.__package__, name).unavailable()
