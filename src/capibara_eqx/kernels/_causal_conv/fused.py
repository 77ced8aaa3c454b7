"""The fused kernels, behind the signature that all implementations share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from .. import _backends
from .._carry import alike
from .._closure import Backend, Closure, Operation
from . import xla
from ._operands import Operands, pack


_PACKAGE = __name__.rpartition(".")[0]
NAMES = ("cpu", "pallas_tpu", "pallas_gpu")


class _Static(NamedTuple):
    """What is fixed when the call is traced; no `implementation` is the platform's."""

    dilation: int
    silu: bool
    implementation: str | None


def _results(operands: Operands, static: _Static):
    return [jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype)]


def _saved(operands: Operands, static: _Static):
    return None


def _plain(operands: Operands, static: _Static):
    return [xla.convolve_rows(operands, static.dilation, static.silu)]


def _backend(platform: str | None, operands: Operands, static: _Static):
    dilation, silu, name = static
    selected = _backends.select(
        _PACKAGE,
        NAMES,
        platform,
        name,
        lambda module: module.refusal(operands, dilation, silu),
    )
    if selected is None:
        return None
    module, options = selected

    def forward(operands, save):
        return module.forward(operands, dilation, silu, **options), None

    def backward(operands, saved, cotangents):
        return module.backward(operands, *cotangents, dilation, silu, **options)

    return Backend(forward, backward)


_convolution = Closure(
    Operation(
        name="causal_conv",
        weights=frozenset({"weight", "bias"}),
        results=_results,
        saved=_saved,
        plain=_plain,
        backend=_backend,
    )
)


def implementation(name: str | None) -> Callable[..., Any]:
    """The kernel `name`, or with `None` that of the platform that is lowered for."""
    return functools.partial(causal_conv, name)


def causal_conv(
    name: str | None,
    x: Float[Array, "*batch seq c_in"],
    weight: Float[Array, "c_out c_in_per_group width"],
    bias: Float[Array, " c_out"] | None,
    dilation: int,
    groups: int,
    history: Float[Array, "*batch reach c_in"],
    document: Int[Array, "*batch reach_and_seq"] | None,
    activation: str | None,
) -> Float[Array, "*batch seq c_out"]:
    """`kernels.causal_conv` by a fused kernel.

    **Raises:**

    `NotImplementedError` with the reason if the kernel cannot serve: the one called
    `name`, or the own one of the platform that jax runs on.
    """
    if not groups == x.shape[-1] == weight.shape[0]:
        raise NotImplementedError(
            "the fused kernels are for one channel a group; 'xla' serves others by "
            "matrix products"
        )
    operands = pack(x, weight, bias, history, document)
    silu = activation == "silu"
    _backends.require(
        _PACKAGE,
        _backends.serving(NAMES, name),
        x,
        lambda module: module.refusal(operands, dilation, silu),
    )
    (y,) = _convolution(alike(operands), _Static(dilation, silu, name))
    return y.reshape(x.shape)
