"""Float64 for a block of code, in every release of JAX that is supported."""

import importlib
from contextlib import AbstractContextManager

import jax


def enable_x64(enabled: bool = True) -> AbstractContextManager[None]:
    """A context in which JAX has float64, or has it not."""
    # JAX 0.8 moved the context manager to its top level.
    home = (
        jax
        if hasattr(jax, "enable_x64")
        else importlib.import_module("jax.experimental")
    )
    return home.enable_x64(enabled)
