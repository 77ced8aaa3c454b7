"""The fused kernels, behind the signature that all implementations share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from .. import _backends
from .._carry import alike
from .._closure import Backend, Closure, Operation
from . import xla
from ._operands import Operands, pack, saved_shape, state_shape, tokens_of_chunk


_PACKAGE = __name__.rpartition(".")[0]
NAMES = ("cpu",)


class _Static(NamedTuple):
    """What is fixed when the call is traced; no `implementation` is the platform's."""

    chunk_size: int | None
    implementation: str | None


def _results(operands: Operands, static: _Static):
    dtype = operands.log_decay.dtype
    return [
        jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype),
        jax.ShapeDtypeStruct(state_shape(operands), dtype),
    ]


def _saved(operands: Operands, static: _Static):
    chunk = tokens_of_chunk(operands, static.chunk_size)
    return jax.ShapeDtypeStruct(saved_shape(operands, chunk), operands.log_decay.dtype)


def _plain(operands: Operands, static: _Static):
    return xla.ssd(*operands, static.chunk_size)


def _backend(platform: str | None, operands: Operands, static: _Static):
    selected = _backends.select(
        _PACKAGE,
        NAMES,
        platform,
        static.implementation,
        lambda module: module.refusal(operands),
    )
    if selected is None:
        return None
    module, options = selected
    chunk = tokens_of_chunk(operands, static.chunk_size)

    def forward(operands, save):
        return module.forward(operands, chunk, save, **options)

    def backward(operands, saved, cotangents):
        return module.backward(operands, chunk, saved, *cotangents, **options)

    return Backend(forward, backward)


_dual = Closure(
    Operation(
        name="ssd",
        weights=frozenset(),
        results=_results,
        saved=_saved,
        plain=_plain,
        backend=_backend,
    )
)


def implementation(name: str | None) -> Callable[..., Any]:
    """The kernel `name`, or with `None` that of the platform that is lowered for."""
    return functools.partial(ssd, name)


def ssd(
    name: str | None,
    x: Float[Array, "*batch seq n_heads head_dim"],
    log_decay: Float[Array, "*batch seq n_heads"],
    B: Float[Array, "*batch seq n_groups d_state"],
    C: Float[Array, "*batch seq n_groups d_state"],
    coefficient: Float[Array, "*batch seq n_heads"] | None,
    initial_state: Float[Array, "*batch n_heads head_dim d_state"] | None,
    reset: Bool[Array, "*batch seq"] | None,
    chunk_size: int | None,
) -> tuple[
    Float[Array, "*batch seq n_heads head_dim"],
    Float[Array, "*batch n_heads head_dim d_state"],
]:
    """`kernels.ssd` by a fused kernel.

    **Raises:**

    `NotImplementedError` with the reason if the kernel cannot serve: the one called
    `name`, or the own one of the platform that jax runs on.
    """
    operands = pack(x, log_decay, B, C, coefficient, initial_state, reset)
    serving = _backends.serving(NAMES, name)
    _backends.require(_PACKAGE, serving, x, lambda module: module.refusal(operands))
    y, state = _dual(alike(operands), _Static(chunk_size, name))
    return y.reshape(x.shape), state.reshape(*x.shape[:-3], *state.shape[1:])
