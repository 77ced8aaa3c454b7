"""Which fused kernel serves which platform."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ._operands import Operands


# By the name of the platform that is lowered for.
PLATFORMS = {"cpu": "cpu", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}
NAMES = tuple(PLATFORMS.values())


def own() -> str | None:
    """The kernel of the platform that jax runs on, `None` if it has none."""
    platform = jax.default_backend()
    return PLATFORMS.get("cuda" if platform == "gpu" else platform)


class Backend(NamedTuple):
    """The functions of a module as `_operands` describes them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def refusal(name: str, operands: Operands, chunk: int) -> str | None:
    """Why the kernel `name` cannot serve such operands, or `None`."""
    return _module(name).refusal(operands, chunk)


def choose(
    platform: str | None, name: str | None, operands: Operands, chunk: int
) -> Backend | None:
    """The kernel to run on `platform`, `None` for the XLA form.

    **Arguments:**

    - `platform`: that is lowered for, `None` for one that has no kernel.
    - `name`: the kernel that was asked for, `None` for the platform's own.

    **Raises:**

    `NotImplementedError` if the kernel that was asked for does not run there.
    """
    own = None if platform is None else PLATFORMS[platform]
    if name is None:
        if own is None or refusal(own, operands, chunk) is not None:
            return None
        name = own
    module = _module(name)
    if name == own:
        return Backend(module.forward, module.backward)
    if name == "cpu" or platform != "cpu":
        raise NotImplementedError(
            f"selective_scan: implementation {name!r} does not run on the platform "
            f"{platform or 'asked for'}; leave `implementation` out to let the platform "
            "choose, or pass 'xla'."
        )
    # The CPU runs the kernels of other platforms step by step: slow, for tests.
    return Backend(
        functools.partial(module.forward, interpret=True),
        functools.partial(module.backward, interpret=True),
    )


def _module(name: str) -> Any:
    # Not at the top: Pallas is slow to import, and many never need it.
    return importlib.import_module(f".{name}", __package__)
