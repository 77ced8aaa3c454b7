"""The dual in C++ for the CPU, by XLA's foreign function interface.

A CPU takes the recurrence itself: what need not be read and written again is worth more
to it than products of whole chunks. Some rows of a head's state stay in registers over
the tokens of a chunk. The backward pass computes the states of a chunk again from the
saved one that entered it. The heads are shared out over XLA's own threads.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._native import Unavailable, handlers
from .._parts import sum_of_parts
from ._operands import Operands, saved_shape, state_shape


_FORWARD = "capibara_ssd_forward"
_BACKWARD = "capibara_ssd_backward"
_SOURCE = Path(__file__).with_name("cpu.cc")
_INITIAL_STATE = Operands._fields.index("initial_state")

# The sums for B and C are kept apart for so many parts of the heads, so that as many
# threads can work at them; more parts are more memory and a longer sum. Those of
# different groups are apart already.
_PARTS = 8


def refusal(operands: Operands) -> str | None:
    """Why the C++ form cannot serve, or `None`."""
    del operands
    return unavailable()


def unavailable() -> str | None:
    """Why the compiled library is not to be had on this machine, or `None`."""
    try:
        handlers(_SOURCE, (_FORWARD, _BACKWARD))
    except Unavailable as reason:
        return str(reason)
    return None


def forward(
    operands: Operands, chunk: int, save: bool
) -> tuple[
    Float[Array, "rows seq n_heads head_dim"],
    Float[Array, "rows n_heads head_dim d_state"],
    Float[Array, "rows chunks n_heads head_dim d_state"] | None,
]:
    """See `_operands`."""
    saved = saved_shape(operands, chunk) if save else (0,)
    shapes = [operands.x.shape, state_shape(operands), saved]
    dtype = operands.log_decay.dtype
    in_place = operands.x.shape[1] == 1 and operands.initial_state is not None
    call = jax.ffi.ffi_call(
        _FORWARD,
        [jax.ShapeDtypeStruct(s, dtype) for s in shapes],
        # In a loop that decodes the state then stays where it is.
        input_output_aliases={_INITIAL_STATE: 1} if in_place else None,
    )
    y, final_state, saved = call(*_dense(operands), chunk=chunk)
    return y.astype(operands.x.dtype), final_state, saved if save else None


def backward(
    operands: Operands,
    chunk: int,
    saved: Float[Array, "rows chunks n_heads head_dim d_state"],
    dy: Float[Array, "rows seq n_heads head_dim"],
    dfinal_state: Float[Array, "rows n_heads head_dim d_state"],
) -> Operands:
    """See `_operands`."""
    dtype = operands.log_decay.dtype
    rows, seq, n_heads, _ = operands.x.shape
    heads = (rows, seq, n_heads)
    n_groups = operands.B.shape[2]
    parts = max(1, min(_PARTS // n_groups, n_heads // n_groups))
    sums = (rows, parts, *operands.B.shape[1:])
    shapes = [operands.x.shape, heads, sums, sums, heads, state_shape(operands)]
    results = [
        jax.ShapeDtypeStruct((0,) if operand is None else shape, dtype)
        for shape, operand in zip(shapes, operands[:-1], strict=True)
    ]
    call = jax.ffi.ffi_call(_BACKWARD, results)
    cotangents = (saved, dy.astype(dtype), dfinal_state)
    dx, dlog_decay, dB, dC, *optional = call(
        *_dense(operands), *cotangents, chunk=chunk
    )
    present = zip(optional, operands[4:-1], strict=True)
    return Operands(
        dx.astype(operands.x.dtype),
        dlog_decay,
        sum_of_parts(dB).astype(operands.B.dtype),
        sum_of_parts(dC).astype(operands.C.dtype),
        *(None if x is None else dx for dx, x in present),
        reset=None,
    )


def _dense(operands: Operands) -> list[Array]:
    """In the accumulator's dtype, what is absent without elements."""
    dtype = operands.log_decay.dtype
    *arrays, reset = operands
    dense = [jnp.zeros((0,), dtype) if x is None else x.astype(dtype) for x in arrays]
    return [*dense, jnp.zeros((0,), bool) if reset is None else reset]
