"""Which kernel of an operation serves which platform."""

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from platform import machine, processor
from typing import Any

import jax


# The kernel of each platform that is lowered for, if an operation has it.
PLATFORMS = {"cpu": "cpu", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def platform() -> str:
    """The platform that jax runs on, by the name that it is lowered for."""
    found = jax.default_backend()
    return "cuda" if found == "gpu" else found


@functools.cache
def device_kind() -> str:
    """The kind of device that jax runs on; of a CPU, the model of the processor."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    # Linux tells it here alone, other systems there.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    if models:
        return models[0].partition(":")[2].strip()
    return processor() or machine()


def serving(names: Sequence[str], name: str | None) -> str:
    """`name`, or without one the kernel of the platform that jax runs on.

    **Arguments:**

    - `names`: of the operation's kernels.
    - `name`: of one of them, or `None`.

    **Raises:**

    `NotImplementedError` if there is none for that platform.
    """
    own = PLATFORMS.get(platform()) if name is None else name
    if own is None or own not in names:
        raise NotImplementedError(f"there is no fused kernel for {platform()}")
    return own


def load(package: str, name: str) -> Any:
    """The module of the kernel `name` in the folder of its operation."""
    # Not at the top of a file: Pallas is slow to import, and many never need it.
    return importlib.import_module(f".{name}", package)


def select(
    package: str,
    names: Sequence[str],
    platform: str | None,
    name: str | None,
    refusal: Callable[[Any], str | None],
) -> tuple[Any, dict[str, bool]] | None:
    """The module to run on a platform and its options, `None` for the XLA form.

    **Arguments:**

    - `package`: of the operation, for messages too.
    - `names`: of its kernels.
    - `platform`: that is lowered for, `None` for one that has no kernel.
    - `name`: the kernel that was asked for, `None` for the platform's own.
    - `refusal`: why a module cannot serve, `None` if it can.

    **Raises:**

    `NotImplementedError` if the kernel that was asked for does not run there.
    """
    own = None if platform is None else PLATFORMS[platform]
    if name is None:
        if own is None or own not in names:
            return None
        module = load(package, own)
        return None if refusal(module) is not None else (module, {})
    if name == own:
        return load(package, name), {}
    if platform == "cpu":
        # Kernels of other platforms, step by step: slow, for tests.
        return load(package, name), {"interpret": True}
    raise NotImplementedError(
        f"{package.rpartition('.')[-1].strip('_')}: implementation {name!r} does not "
        f"run on {platform or 'this platform'}; leave `implementation` out to let the "
        "platform choose, or pass 'xla'."
    )


def require(
    package: str, name: str, x: Any, refusal: Callable[[Any], str | None]
) -> None:
    """Raise `NotImplementedError` with the reason if the kernel `name` cannot serve.

    **Arguments:**

    - `package`, `refusal`: as for `select`.
    - `name`: of the kernel.
    - `x`: an operand, whose type says how all are sharded.
    """
    if any(axis is not None for axis in jax.typeof(x).sharding.spec):
        raise NotImplementedError(
            "a fused kernel does not take arrays that are sharded along an Explicit "
            "axis; call it inside `jax.shard_map`, or use 'xla'"
        )
    reason = refusal(load(package, name))
    if reason is not None:
        raise NotImplementedError(reason)
