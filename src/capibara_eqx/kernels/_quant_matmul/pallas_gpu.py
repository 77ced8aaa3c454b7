"""The packed product for NVIDIA GPUs: Pallas on Triton.

A block decodes codes in registers and multiplies a block of tokens with them on the
tensor cores, a chunk of the inputs after the other, so that what is read of a matrix is
its codes. Triton, where the other kernels are Mosaic's, for its products of eight bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .._carry import type_of
from . import _planes
from ._decode import Packing
from ._operands import Operands
from ._planes import Chunk


# Not tuned: no measurement on a GPU stands behind the numbers. Sizes are powers of two,
# as Triton wants them, and at least what its products take.
_TOKENS = (16, 32, 64)
_ROWS = 64
_SPANS = (64, 32)
_AMPERE = 8.0


class Form(NamedTuple):
    """The static shape of one kernel's work."""

    packing: Packing
    chunk: Chunk
    tokens: int
    rows: int
    width: int


def unavailable() -> str | None:
    """Why it cannot run on this machine's GPU, or `None`."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    try:
        new_enough = float(capability) >= _AMPERE
    except ValueError:
        # Chips of other makers have names there.
        new_enough = False
    if new_enough:
        return None
    return (
        "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and this "
        f"one, {device.device_kind}, has {capability}"
    )


def refusal(
    operands: Operands, packing: Packing, activations: str | None
) -> str | None:
    """Why these operands cannot be served, or `None`."""
    del activations
    reason = unavailable() or _planes.refusal(operands, packing)
    return reason or _planes.chunk_refusal(packing, _SPANS)


def forward(
    operands: Operands,
    packing: Packing,
    activations: str | None,
    *,
    interpret: bool = False,
) -> Float[Array, "tokens out"]:
    """The product.

    **Arguments:**

    - `operands`, `packing`, `activations`: see `reference`.
    - `interpret`: run the kernel's interpreter, on any platform.
    """
    from jax.experimental.pallas import triton

    chunk = _planes.chunk_for(packing, _SPANS)
    assert chunk is not None
    x, step = _planes.tokens_of(operands, activations)
    tokens, rows = len(x), len(operands.codes)
    block = next((n for n in _TOKENS if n >= tokens), _TOKENS[-1])
    planes = _padded(_planes.by_place(x, packing, chunk.span), 1, block)
    form = Form(packing, chunk, block, _ROWS, planes.shape[2])
    # Of the usual sizes there is nothing to pad, and so no copy of the codes.
    codes = _padded(_padded(operands.codes, 0, _ROWS), 1, chunk.span)
    scale = _padded(_planes.scale_by_chunk(operands, packing, chunk), 2, _ROWS)
    y = pl.pallas_call(
        functools.partial(_body, form),
        grid=(planes.shape[1] // block, codes.shape[0] // _ROWS),
        in_specs=[
            pl.BlockSpec((len(planes), block, form.width), lambda t, r: (0, t, 0)),
            pl.BlockSpec((_ROWS, form.width), lambda t, r: (r, 0)),
            pl.BlockSpec((*scale.shape[:2], _ROWS), lambda t, r: (0, 0, r)),
        ],
        out_specs=pl.BlockSpec((block, _ROWS), lambda t, r: (t, r)),
        out_shape=type_of(planes, codes, scale).update(
            shape=(planes.shape[1], codes.shape[0])
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="quant_matmul",
        interpret=interpret,
    )(planes, codes, scale)
    return _planes.finished(y[:tokens, :rows], x, step, operands, packing)


def _padded(x: Any, axis: int, multiple: int) -> Any:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _body(form: Form, x_ref, codes_ref, scale_ref, y_ref):
    bits, span = form.packing.bits, form.chunk.span
    size = _planes.group_bytes(form.packing)

    def step(chunk, sums):
        # It has 64 bits where those are enabled.
        chunk = chunk.astype(jnp.int32)
        lanes = pl.ds(chunk * span, span)
        packed = codes_ref[:, lanes].astype(jnp.int32)
        planes = [
            (x_ref[place, :, lanes], _planes.decoded(packed, place, bits, x_ref.dtype))
            for place in range(x_ref.shape[0])
        ]
        several = lax.div(chunk, np.int32(form.chunk.chunks))
        for group in range(form.chunk.groups):
            terms = []
            for x, codes in planes:
                if form.chunk.groups > 1:
                    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
                    x = _planes.only_group(x, lane, group, size)
                terms.append(_planes.dot(x, codes))
            total = sum(terms[1:], terms[0]).astype(jnp.float32)
            scale = jnp.broadcast_to(scale_ref[several, group, :][None], total.shape)
            sums = sums + total * scale
        return sums

    sums = jnp.zeros((form.tokens, form.rows), jnp.float32)
    y_ref[...] = lax.fori_loop(0, form.width // span, step, sums)
