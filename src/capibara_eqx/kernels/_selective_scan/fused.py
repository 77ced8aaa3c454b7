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
from ._operands import Operands, pack, saved_shape
from ._tuning import Sizes, sizes_for


_PACKAGE = __name__.rpartition(".")[0]
NAMES = ("cpu", "pallas_tpu", "pallas_gpu")


class _Static(NamedTuple):
    """What is fixed when the scan is traced; no `implementation` is the platform's."""

    softplus: bool
    sizes: Sizes
    implementation: str | None


def _results(operands: Operands, static: _Static):
    rows, _, d_inner = operands.u.shape
    dtype = operands.A.dtype
    return [
        jax.ShapeDtypeStruct(operands.u.shape, operands.u.dtype),
        jax.ShapeDtypeStruct((rows, d_inner, operands.A.shape[-1]), dtype),
    ]


def _saved(operands: Operands, static: _Static):
    shape = saved_shape(operands, static.sizes.chunk)
    return jax.ShapeDtypeStruct(shape, operands.A.dtype)


def _plain(operands: Operands, static: _Static):
    return xla.scan_rows(operands, static.softplus)


def _backend(platform: str | None, operands: Operands, static: _Static):
    softplus, sizes, name = static
    selected = _backends.select(
        _PACKAGE,
        NAMES,
        platform,
        name,
        lambda module: module.refusal(operands, sizes),
    )
    if selected is None:
        return None
    module, options = selected

    def forward(operands, save):
        return module.forward(operands, softplus, sizes, save, **options)

    def backward(operands, saved, cotangents):
        return module.backward(operands, saved, *cotangents, softplus, sizes, **options)

    return Backend(forward, backward)


_scan = Closure(
    Operation(
        name="selective_scan",
        weights=frozenset({"A", "D", "delta_bias"}),
        results=_results,
        saved=_saved,
        plain=_plain,
        backend=_backend,
    )
)


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
    *,
    sizes: Sizes | None = None,
) -> tuple[Float[Array, "*batch seq d_inner"], Float[Array, "*batch d_inner d_state"]]:
    """`kernels.selective_scan` by a fused kernel, cut as `sizes` say, if given.

    **Raises:**

    `NotImplementedError` with the reason if the kernel cannot serve: the one called
    `name`, or the own one of the platform that jax runs on.
    """
    serving = _backends.serving(NAMES, name)
    operands = pack(u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    if sizes is None:
        sizes = sizes_for(serving, u.shape[-2])
    _backends.require(
        _PACKAGE, serving, u, lambda module: module.refusal(operands, sizes)
    )
    y, state = _scan(alike(operands), _Static(delta_softplus, sizes, name))
    return y.reshape(u.shape), state.reshape(*u.shape[:-2], *A.shape)
