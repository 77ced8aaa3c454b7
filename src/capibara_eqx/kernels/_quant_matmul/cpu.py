"""The packed product in whole numbers, in C++ for the CPU.

XLA's product of eight bits by eight is less than 1.6 times as fast on a CPU as that of
32 bits (jaxlib 0.10.2), and its matrix has to be decoded in memory. Here a block of
rows is decoded in the cache, and products of unsigned bytes by signed ones, which codes
and tokens are as they come, are summed four at a time.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float

from .._native import Unavailable, handlers
from . import _planes
from ._decode import Packing
from ._operands import Operands, quantize_tokens


_HANDLER = "capibara_quant_matmul"
_SOURCE = Path(__file__).with_name("cpu.cc")
# Bytes of a row that are read together.
_QUAD = 4


def refusal(
    operands: Operands, packing: Packing, activations: str | None
) -> str | None:
    """Why the C++ form cannot serve, or `None`."""
    if activations is None:
        return (
            "it multiplies whole numbers only, with `activations='int8'` or "
            "'static_int8'"
        )
    if packing.groups > 1 and _planes.group_bytes(packing) % _QUAD:
        return (
            f"groups of {packing.group_size} codes of {packing.bits} bits are not of "
            f"{_QUAD} bytes or a multiple"
        )
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return "it cannot be called inside `jax.shard_map`"
    return _planes.refusal(operands, packing) or unavailable()


def unavailable() -> str | None:
    """Why the compiled library is not to be had on this machine, or `None`."""
    if not _has_instruction():
        return "the processor has no AVX-512 VNNI, products of bytes"
    try:
        handlers(_SOURCE, (_HANDLER,))
    except Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def _has_instruction() -> bool:
    # Linux tells it here; other systems do not run on such processors.
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_vnni" in info.read_text(errors="replace")


def forward(
    operands: Operands, packing: Packing, activations: str | None
) -> Float[Array, "tokens out"]:
    """See `reference`."""
    del activations
    x, step = quantize_tokens(operands.x, operands.input_scale)
    rows, groups = operands.codes.shape[0], packing.groups
    of_groups = (groups, rows)
    middle = jnp.full((1, groups), packing.middle, jnp.uint8)
    zero = middle if operands.zero is None else operands.zero
    call = jax.ffi.ffi_call(_HANDLER, jax.ShapeDtypeStruct((len(x), rows), jnp.float32))
    return call(
        _planes.by_place(x, packing, _QUAD).swapaxes(0, 1),
        operands.codes,
        jnp.broadcast_to(operands.scale.astype(jnp.float32).T, of_groups),
        jnp.broadcast_to(zero.astype(jnp.int32).T, of_groups),
        _planes.sums_of_groups(x, packing, jnp.int32),
        step,
        bits=packing.bits,
        group_bytes=_planes.group_bytes(packing),
    )
