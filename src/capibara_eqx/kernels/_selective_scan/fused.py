"""The fused kernels, behind the signature that all implementations share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from .._carry import alike
from . import _backends
from ._operands import pack
from ._rules import fused_scan


# Tokens between two saved states.
_CHUNKS = {"cpu": 64, "pallas_tpu": 128, "pallas_gpu": 16}


def implementation(name: str | None) -> Callable[..., Any]:
    """The kernel `name`, or with `None` that of the platform that is lowered for."""
    return functools.partial(selective_scan, name)


def selective_scan(
    name: str | None,
    u: Float[Array, "*batch seq d_inner"],
    delta: Float[Array, "*batch seq d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, "*batch seq d_state"],
    C: Float[Array, "*batch seq d_state"],
    D: Float[Array, " d_inner"] | None,
    z: Float[Array, "*batch seq d_inner"] | None,
    delta_bias: Float[Array, " d_inner"] | None,
    delta_softplus: bool,
    initial_state: Float[Array, "*batch d_inner d_state"] | None,
    reset: Bool[Array, "*batch seq"] | None,
) -> tuple[Float[Array, "*batch seq d_inner"], Float[Array, "*batch d_inner d_state"]]:
    """`kernels.selective_scan` by a fused kernel.

    **Raises:**

    `NotImplementedError` with the reason if the kernel cannot serve: the one called
    `name`, or the own one of the platform that jax runs on.
    """
    if any(axis is not None for axis in jax.typeof(u).sharding.spec):
        raise NotImplementedError(
            "a fused kernel does not take arrays that are sharded along an Explicit "
            "axis; call it inside `jax.shard_map`, or use 'xla'"
        )
    operands = pack(u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    serving = _backends.own() if name is None else name
    if serving is None:
        raise NotImplementedError(f"{jax.default_backend()} has no fused kernel")
    chunk = min(_CHUNKS[serving], u.shape[-2])
    reason = _backends.refusal(serving, operands, chunk)
    if reason is not None:
        raise NotImplementedError(reason)
    y, state = fused_scan(alike(operands), delta_softplus, chunk, name)
    return y.reshape(u.shape), state.reshape(*u.shape[:-2], *A.shape)
