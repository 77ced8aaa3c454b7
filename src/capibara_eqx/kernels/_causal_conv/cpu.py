"""The depthwise causal convolution in C++ for the CPU.

One pass over the tokens, without a copy of them behind their history, and the
activation in the same pass. The backward pass computes the convolution again rather
than to keep it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...internal import accumulator_dtype
from .._native import Unavailable, handlers
from .._parts import sum_of_parts
from ._operands import Operands


_FORWARD = "capibara_causal_conv_forward"
_BACKWARD = "capibara_causal_conv_backward"
_SOURCE = Path(__file__).with_name("cpu.cc")

# Sums over the tokens are kept apart for so many parts of them, of so many tokens at
# least, so that as many threads can work at them.
_PARTS = 8
_TOKENS = 64


def refusal(operands: Operands, dilation: int, silu: bool) -> str | None:
    """Why the C++ form cannot serve, or `None`."""
    del operands, dilation, silu
    return unavailable()


def unavailable() -> str | None:
    """Why the compiled library is not to be had on this machine, or `None`."""
    try:
        handlers(_SOURCE, (_FORWARD, _BACKWARD))
    except Unavailable as reason:
        return str(reason)
    return None


def forward(
    operands: Operands, dilation: int, silu: bool
) -> Float[Array, "rows seq channels"]:
    """See `_operands`."""
    x = operands.x
    dtype = accumulator_dtype(x.dtype)
    call = jax.ffi.ffi_call(_FORWARD, jax.ShapeDtypeStruct(x.shape, dtype))
    return call(*_dense(operands, dtype), dilation=dilation, silu=silu).astype(x.dtype)


def backward(
    operands: Operands,
    dy: Float[Array, "rows seq channels"],
    dilation: int,
    silu: bool,
) -> Operands:
    """See `_operands`."""
    x, weight, bias, history, _ = operands
    dtype = accumulator_dtype(x.dtype)
    rows, seq, channels = x.shape
    width = weight.shape[-1]
    parts = max(1, min(_PARTS, seq // _TOKENS))
    shapes = [x.shape, (rows, parts, width + 1, channels), history.shape]
    call = jax.ffi.ffi_call(_BACKWARD, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
    dx, dweights, dhistory = call(
        *_dense(operands, dtype), dy.astype(dtype), dilation=dilation, silu=silu
    )
    dweights = sum_of_parts(dweights)
    return Operands(
        dx.astype(x.dtype),
        dweights[:, :width].swapaxes(1, 2).astype(weight.dtype),
        None if bias is None else dweights[:, width].astype(bias.dtype),
        dhistory.astype(history.dtype),
        None,
    )


def _dense(operands: Operands, dtype) -> list[Array]:
    """In the accumulator's dtype, what is absent without elements."""
    x, weight, bias, history, document = operands
    return [
        x.astype(dtype),
        weight.swapaxes(1, 2).astype(dtype),
        jnp.zeros((0,), dtype) if bias is None else bias.astype(dtype),
        # As exact as in the XLA form, which reads both in the dtype of `x`.
        history.astype(x.dtype).astype(dtype),
        jnp.zeros((0,), jnp.int32) if document is None else document.astype(jnp.int32),
    ]
