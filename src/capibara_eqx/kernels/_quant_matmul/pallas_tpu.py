"""The packed product for TPUs: Pallas on Mosaic.

A grid step decodes one block of codes in VMEM and multiplies a block of tokens with it,
so that what is read of a matrix is its codes. Blocks along the inputs go by last, and
their sums stay in VMEM.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .._pallas_tpu import Job, Layout, launch, up
from . import _planes
from ._decode import Packing
from ._operands import Operands
from ._planes import Chunk


# Not tuned: no measurement on a TPU stands behind the numbers. With 4 places of float32
# the tokens of a block take 2 MiB, which is fetched while another is worked on.
_TOKENS = 256
_ROWS = 256
_SPANS = (512, 384, 256, 128)


class Form(NamedTuple):
    """The static shape of one kernel's work."""

    packing: Packing
    chunk: Chunk
    tokens: int
    rows: int

    @property
    def places(self) -> int:
        return _planes.codes_a_byte(self.packing)

    @property
    def width(self) -> int:
        return up(_planes.row_bytes(self.packing), self.chunk.span)

    @property
    def block(self) -> tuple[int, int]:
        """Tokens and rows: a multiple of what a tile has, or all."""
        return min(self.tokens, _TOKENS), min(self.rows, _ROWS)

    @property
    def grid(self) -> tuple[int, int, int]:
        tokens, rows = self.block
        chunks = self.width // self.chunk.span
        return -(-self.tokens // tokens), -(-self.rows // rows), chunks


def unavailable() -> str | None:
    """Why it cannot run on this machine's TPU, or `None`."""
    return None


def refusal(
    operands: Operands, packing: Packing, activations: str | None
) -> str | None:
    """Why these operands cannot be served, or `None`."""
    del activations
    reason = _planes.refusal(operands, packing)
    return reason or _planes.chunk_refusal(packing, _spans(packing))


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
    chunk = _planes.chunk_for(packing, _spans(packing))
    assert chunk is not None
    x, step = _planes.tokens_of(operands, activations)
    form = Form(packing, chunk, len(x), len(operands.codes))
    job = Job(
        body=functools.partial(_body, form),
        grid=form.grid,
        layout=_layouts(form).__getitem__,
        inputs={
            "x": _planes.by_place(x, packing, chunk.span),
            # Mosaic knows no unsigned numbers in all versions.
            "codes": lax.bitcast_convert_type(operands.codes, jnp.int8),
            "scale": _planes.scale_by_chunk(operands, packing, chunk),
        },
        outputs={"y": jnp.float32},
        scratch={"sums": form.block},
        interpret=interpret,
    )
    return _planes.finished(launch(job)["y"], x, step, operands, packing)


def _spans(packing: Packing) -> tuple[int, ...]:
    """Chunks of whole lanes, or all bytes if they are few."""
    size = _planes.row_bytes(packing)
    spans = tuple(span for span in _SPANS if span < size)
    return (size, *spans) if size <= _SPANS[0] else spans


def _layouts(form: Form) -> dict[str, Layout]:
    (tokens, rows), span = form.block, form.chunk.span
    groups, stretch = form.chunk.groups, form.chunk.chunks
    size = _planes.row_bytes(form.packing)
    several = -(-form.packing.groups // groups)

    def scales(t, r, c):
        # Not `//`, which asks for signs, and there is none here.
        return lax.div(c, np.int32(stretch)), 0, r

    return {
        "x": Layout(
            (form.places, form.tokens, form.width),
            (form.places, tokens, span),
            lambda t, r, c: (0, t, c),
        ),
        "codes": Layout((form.rows, size), (rows, span), lambda t, r, c: (r, c)),
        "scale": Layout((several, groups, form.rows), (None, groups, rows), scales),
        "y": Layout((form.tokens, form.rows), (tokens, rows), lambda t, r, c: (t, r)),
    }


def _body(form: Form, *, x_ref, codes_ref, scale_ref, y_ref, sums_ref):
    step, bits = pl.program_id(2), form.packing.bits

    @pl.when(step == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    packed = codes_ref[...].astype(jnp.int32)
    planes = [
        _planes.decoded(packed, place, bits, x_ref.dtype)
        for place in range(form.places)
    ]
    size = _planes.group_bytes(form.packing)
    for group in range(form.chunk.groups):
        terms = []
        for place, codes in enumerate(planes):
            x = x_ref[place]
            if form.chunk.groups > 1:
                lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
                x = _planes.only_group(x, lane, group, size)
            terms.append(_planes.dot(x, codes))
        total = sum(terms[1:], terms[0]).astype(jnp.float32)
        scale = scale_ref[group : group + 1, :]
        sums_ref[...] += total * jnp.broadcast_to(scale, total.shape)

    @pl.when(step == form.grid[2] - 1)
    def _():
        y_ref[...] = sums_ref[...]
