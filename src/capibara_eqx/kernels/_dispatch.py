from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from ..internal import nearest


SCOPE = "capibara_eqx.kernels."


def dispatch(
    operation: str,
    backends: Mapping[str, Callable[..., Any]],
    implementation: str | Sequence[str] | None,
    *args: Any,
    default: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Run `operation` by the first backend that can, under its name.

    In traces and profiles what it computes is in the scope
    `capibara_eqx.kernels.<operation>.<backend>`.

    **Arguments:**

    - `operation`: its public name, for messages.
    - `backends`: name to function; all share one signature. A backend raises
        `NotImplementedError` for a case that it cannot serve.
    - `implementation`: `None` for the default, a name for that one alone, a sequence
        for the first of them that can.
    - `args`: passed on.
    - `default`: what `None` stands for, tried in order; the XLA form if not given,
        which runs on every platform.

    **Returns:**

    What the backend returns.

    **Raises:**

    `ValueError` for a name that is not a backend. `NotImplementedError` if the one
    that was named cannot serve the case, an `ExceptionGroup` with every reason if
    none of several can.
    """
    if implementation is None:
        backends = {"xla": backends["xla"]} if default is None else default
        names = tuple(backends)
    elif isinstance(implementation, str):
        names = (implementation,)
    else:
        names = tuple(implementation)
    check_names(operation, names, backends)
    refusals = []
    for name in names:
        try:
            with jax.named_scope(f"{SCOPE}{operation}.{name}"):
                return backends[name](*args)
        except NotImplementedError as error:
            error.add_note(f"{operation}: implementation {name!r}")
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    raise ExceptionGroup(f"{operation}: no implementation serves this case", refusals)


def check_names(operation: str, names: Sequence[str], known: Iterable[str]) -> None:
    """`ValueError` unless `names` has any, and all of them are known."""
    known = tuple(known)
    if not names:
        raise ValueError(
            f"{operation}: `implementation` names no backend; choose from "
            f"{', '.join(known)}, or pass None for the default."
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"{operation}: unknown `implementation` {name!r}; choose from "
                f"{', '.join(known)}.{nearest(name, known)}"
            )
