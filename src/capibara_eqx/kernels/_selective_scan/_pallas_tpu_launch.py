"""How the operands of the scan are laid out, cut and handed to a TPU kernel.

A grid step is one row, one tile of channels and one chunk of tokens, in that order, so
that what belongs to a row and a tile stays in VMEM while its chunks go by. Channels lie
on the lanes, the states of a channel on the sublanes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from .. import _pallas_tpu
from .._pallas_tpu import GROUP, LANES, VMEM, Job, Layout, up
from ._operands import Operands
from ._tuning import Sizes


# State-shaped values that the compiler keeps in VMEM for want of registers, at most: of
# 176 states in 128 channels it was found to keep 44.
_SPILLED = 48

# States of one token that are worked on together, eight registers. In the schedules
# that the compiler makes for a v5e, 16 states a channel, both kernels need 11 % fewer
# instructions a channel than with half of that, and hardly fewer with more.
_STATES_A_STEP = 8192


class Form(NamedTuple):
    """The static shape of one kernel's work."""

    softplus: bool
    rows: int
    rows_per_weights: int  # rows that share A, D and the bias
    seq: int
    span: int  # tokens of a chunk, a multiple of `GROUP`
    d_inner: int
    tile: int  # channels of a grid step
    d_state: int
    backwards: bool  # whether chunks go by from the last to the first
    interpret: bool

    @property
    def chunks(self) -> int:
        return -(-self.seq // self.span)

    @property
    def tiles(self) -> int:
        return -(-self.d_inner // self.tile)

    def chunk(self, step: Any) -> Any:
        """The chunk of a step of the grid."""
        return self.chunks - 1 - step if self.backwards else step


def form_of(
    operands: Operands,
    softplus: bool,
    sizes: Sizes,
    *,
    backwards: bool,
    interpret: bool,
) -> Form:
    """The form of a kernel for these operands, cut as `sizes` say where it can be."""
    (rows, seq, d_inner), d_state = operands.u.shape, operands.A.shape[-1]
    span = span_of(seq, sizes.chunk)
    tile = tile_for(d_inner, d_state, span, sizes.tile)
    per = rows // operands.A.shape[0]
    cut = (seq, span, d_inner, tile, d_state)
    return Form(softplus, rows, per, *cut, backwards=backwards, interpret=interpret)


def span_of(seq: int, chunk: int) -> int:
    """Tokens of a chunk with padding; only a chunk that is the whole row has any."""
    return up(min(seq, chunk), GROUP)


def tile_for(d_inner: int, d_state: int, span: int, most: int | None = None) -> int:
    """Channels of a tile, a multiple of 128 or all.

    As many as `_STATES_A_STEP` has room for, or `most`, and as VMEM has.
    """
    if most is None:
        most = max(_STATES_A_STEP // up(d_state, 8) // LANES, 1) * LANES
    while most > LANES and vmem_bytes(most, d_state, span) > VMEM:
        most -= LANES
    # Tiles of equal size, and no channel beyond the last one if there is but one tile.
    count = -(-d_inner // most)
    return d_inner if count == 1 else up(-(-d_inner // count), LANES)


def vmem_bytes(tile: int, d_state: int, span: int) -> int:
    """VMEM of the backward kernel, which takes more than the forward."""
    lanes, states, tokens = up(tile, LANES), up(d_state, 8), up(span, LANES)
    wide = 7 * span * lanes  # u, delta, z, dy, du, ddelta, dz
    narrow = 4 * states * tokens  # B, C, dB, dC
    state = 5 * states * lanes + 5 * 8 * lanes  # A, the four states; D, bias, sums
    # While a block is worked on, the next one is fetched and the last one written.
    blocks = 2 * (wide + narrow + state)
    scratch = (span + 1 + _SPILLED) * states * lanes + 6 * GROUP * lanes
    return 4 * (blocks + scratch)


def _layouts(form: Form) -> dict[str, Layout]:
    rows, tiles, chunks, chunk = form.rows, form.tiles, form.chunks, form.chunk
    seq, span, d_inner, tile = form.seq, form.span, form.d_inner, form.tile
    per, d_state = form.rows_per_weights, form.d_state
    groups = rows // per

    def group(row):
        # Not `//`, which asks for signs, and there is none here.
        return jax.lax.div(row, np.int32(per))

    states = (None, d_state, tile)
    narrow = (None, None, d_state, span)
    return {
        "wide": Layout(
            (rows, seq, d_inner), (None, span, tile), lambda r, t, c: (r, chunk(c), t)
        ),
        "narrow": Layout(
            (rows, chunks, d_state, span), narrow, lambda r, t, c: (r, chunk(c), 0, 0)
        ),
        "partial": Layout(
            (rows, tiles, chunks, d_state, span),
            (None, *narrow),
            lambda r, t, c: (r, t, chunk(c), 0, 0),
        ),
        "flags": Layout(
            (rows, chunks, 1, span),
            (None, None, 1, span),
            lambda r, t, c: (r, chunk(c), 0, 0),
            scalar=True,
        ),
        "rates": Layout(
            (groups, d_state, d_inner), states, lambda r, t, c: (group(r), 0, t)
        ),
        "weight": Layout(
            (groups, 1, d_inner), (None, 1, tile), lambda r, t, c: (group(r), 0, t)
        ),
        "sum": Layout((rows, 1, d_inner), (None, 1, tile), lambda r, t, c: (r, 0, t)),
        "state": Layout((rows, d_state, d_inner), states, lambda r, t, c: (r, 0, t)),
        "saved": Layout(
            (rows, chunks, d_state, d_inner),
            (None, *states),
            lambda r, t, c: (r, chunk(c), 0, t),
        ),
    }


# The layout of every operand and result; what is absent belongs to the "wide" ones.
_KINDS = {
    **{"B": "narrow", "C": "narrow", "dB": "partial", "dC": "partial"},
    **{"reset": "flags", "A": "rates", "D": "weight", "bias": "weight"},
    **{"dA": "state", "dD": "sum", "dbias": "sum", "saved": "saved"},
    **dict.fromkeys(("initial", "final", "dinitial", "dfinal"), "state"),
}


def launch(
    form: Form,
    body: Callable[..., None],
    inputs: Mapping[str, Shaped[Array, "..."] | None],
    outputs: Mapping[str, DTypeLike | None],
    scratch: Mapping[str, tuple[int, ...] | None],
) -> dict[str, Any]:
    """Run a kernel.

    **Arguments:**

    - `body`: takes the form and the references of a `Job`'s body.
    - `inputs`, `outputs`, `scratch`: as of a `Job`.

    **Returns:**

    The outputs by name, `None` for absent ones.
    """
    layouts = _layouts(form)
    job = Job(
        body=functools.partial(body, form),
        grid=(form.rows, form.tiles, form.chunks),
        layout=lambda name: layouts[_KINDS.get(name, "wide")],
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        interpret=form.interpret,
    )
    return _pallas_tpu.launch(job)


def narrow(
    form: Form, x: Float[Array, "rows seq d_state"]
) -> Float[Array, "rows chunks d_state span"]:
    """What all channels share of a token, on the lanes as tokens.

    A lane holds one token because the kernel wants a column of states; with states on
    the lanes, of which there are few, an array would also take eight times its size.
    """
    x = _chunked(form, x.astype(jnp.float32))
    return x.swapaxes(2, 3)


def from_partial(
    form: Form, x: Float[Array, "rows tiles chunks d_state span"]
) -> Float[Array, "rows seq d_state"]:
    """The sum over all channels, of those over the channels of each tile."""
    total = jnp.sum(x, axis=1).swapaxes(2, 3)
    return total.reshape(form.rows, -1, form.d_state)[:, : form.seq]


def flags(
    form: Form, reset: Bool[Array, "rows seq"]
) -> Int[Array, "rows chunks 1 span"]:
    return _chunked(form, reset.astype(jnp.int32))[:, :, None]


def _chunked(form, x):
    padding = form.chunks * form.span - form.seq
    x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(form.rows, form.chunks, form.span, *x.shape[2:])
