"""The selective scan in C++ for the CPU, by XLA's foreign function interface.

Registers hold neighbouring channels, the first-level cache their states. The backward
pass computes the states of a chunk again from the saved one that entered it. The tiles
of channels are shared out over XLA's own threads.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._native import Unavailable, handlers
from .._parts import sum_of_parts
from ._operands import Operands, saved_shape
from ._tuning import Sizes


_FORWARD = "capibara_selective_scan_forward"
_BACKWARD = "capibara_selective_scan_backward"
_SOURCE = Path(__file__).with_name("cpu.cc")

# The sums for B and C are kept apart for so many parts of the channels, so that as many
# threads can work at them; more parts are more memory and a longer sum.
_PARTS = 8
# Channels of the smallest part: one tile of four registers of 16 floats.
_CHANNELS = 64


def refusal(operands: Operands, sizes: Sizes) -> str | None:
    """Why the C++ form cannot serve, or `None`."""
    del operands, sizes
    return unavailable()


def unavailable() -> str | None:
    """Why the compiled library is not to be had on this machine, or `None`."""
    try:
        handlers(_SOURCE, (_FORWARD, _BACKWARD))
    except Unavailable as reason:
        return str(reason)
    return None


def forward(
    operands: Operands, softplus: bool, sizes: Sizes, save: bool
) -> tuple[
    Float[Array, "rows seq d_inner"],
    Float[Array, "rows d_inner d_state"],
    Float[Array, "rows chunks d_state d_inner"] | None,
]:
    """See `_operands`."""
    dtype = operands.A.dtype
    rows, _, d_inner = operands.u.shape
    final = (rows, d_inner, operands.A.shape[-1])
    saved = saved_shape(operands, sizes.chunk) if save else (0,)
    shapes = [operands.u.shape, final, saved]
    call = jax.ffi.ffi_call(_FORWARD, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
    out = call(*_dense(operands), softplus=softplus, chunk=sizes.chunk)
    y, final_state, saved = out
    return y.astype(operands.u.dtype), final_state, saved if save else None


def backward(
    operands: Operands,
    saved: Float[Array, "rows chunks d_state d_inner"],
    dy: Float[Array, "rows seq d_inner"],
    dfinal_state: Float[Array, "rows d_inner d_state"],
    softplus: bool,
    sizes: Sizes,
) -> Operands:
    """See `_operands`."""
    dtype = operands.A.dtype
    rows, seq, d_inner = operands.u.shape
    d_state = operands.A.shape[-1]
    parts = max(1, min(_PARTS, d_inner // _CHANNELS))
    sums = (rows, parts, seq, d_state)
    states = (rows, d_inner, d_state)
    stream, vectors = operands.u.shape, (rows, d_inner)
    shapes = [stream, stream, states, sums, sums, vectors, stream, vectors, states]
    results = [
        jax.ShapeDtypeStruct((0,) if operand is None else shape, dtype)
        for shape, operand in zip(shapes, operands[:-1], strict=True)
    ]
    call = jax.ffi.ffi_call(_BACKWARD, results)
    cotangents = (saved, dy.astype(dtype), dfinal_state)
    out = call(*_dense(operands), *cotangents, softplus=softplus, chunk=sizes.chunk)
    du, ddelta, dA, dB, dC, *optional = out
    present = zip(optional, operands[5:-1], strict=True)
    return Operands(
        du.astype(operands.u.dtype),
        ddelta.astype(operands.delta.dtype),
        dA,
        sum_of_parts(dB).astype(operands.B.dtype),
        sum_of_parts(dC).astype(operands.C.dtype),
        *(None if x is None else dx.astype(x.dtype) for dx, x in present),
        reset=None,
    )


def _dense(operands: Operands) -> list[Array]:
    """In the accumulator's dtype, what is absent without elements."""
    dtype = operands.A.dtype
    *arrays, reset = operands
    dense = [jnp.zeros((0,), dtype) if x is None else x.astype(dtype) for x in arrays]
    return [*dense, jnp.zeros((0,), bool) if reset is None else reset]
