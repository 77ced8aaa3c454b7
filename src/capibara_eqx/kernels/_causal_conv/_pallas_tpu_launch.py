"""How the operands of the convolution are laid out and cut for a TPU kernel.

A grid step is one row, one tile of channels and one chunk of tokens, in that order, so
that what a chunk needs of its neighbours stays in VMEM. Channels lie on the lanes,
tokens on the sublanes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._pallas_tpu import GROUP, LANES, VMEM, Layout, up


# Tokens of a chunk, and tokens times channels of a block: a megabyte of float32, next
# to which the time to start a grid step is short. Of fewer tokens there are more
# channels, until the code for all of them is long. A chunk that is short next to the
# reach would have much to move from one to the next.
_SPAN = 512
_LEAST = 128
_BLOCK = 2**18
_TILE = 2048


class Cut(NamedTuple):
    """How the work is cut; chosen by `cut_for` unless given."""

    span: int  # tokens of a chunk, a multiple of `GROUP`
    tile: int  # channels, a multiple of `LANES` or all


class Form(NamedTuple):
    """The static shape of one kernel's work."""

    rows: int
    rows_per_weights: int
    seq: int
    span: int
    channels: int
    tile: int
    width: int
    dilation: int
    silu: bool
    backwards: bool

    @property
    def reach(self) -> int:
        return (self.width - 1) * self.dilation

    @property
    def halo(self) -> int:
        """Rows that are kept for the inputs before a chunk, in whole groups."""
        return up(self.reach, GROUP)

    @property
    def chunks(self) -> int:
        return -(-self.seq // self.span)

    @property
    def lag(self) -> int:
        """Chunks that go by until all that see a token have been seen."""
        return -(-self.reach // self.span) if self.backwards else 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.rows, -(-self.channels // self.tile), self.chunks + self.lag


def cut_for(seq: int, channels: int, width: int, dilation: int) -> Cut:
    """The largest cut for which VMEM has room, or if there is none the smallest.

    Chunks are of equal size, as are tiles. A long reach takes the more of VMEM the more
    channels there are, so that those are given up first.
    """
    *_, least = cuts = list(_cuts(seq, channels))
    return next((c for c in cuts if vmem_bytes(c, width, dilation) <= VMEM), least)


def _cuts(seq: int, channels: int) -> Iterator[Cut]:
    most = _SPAN
    while most >= _LEAST:
        span = up(-(-seq // -(-seq // most)), GROUP)
        wide = min(max(_BLOCK // span // LANES, 1) * LANES, _TILE)
        for lanes in range(wide, 0, -LANES):
            count = -(-channels // lanes)
            yield Cut(
                span, channels if count == 1 else up(-(-channels // count), LANES)
            )
        most //= 2


def vmem_bytes(cut: Cut, width: int, dilation: int) -> int:
    """VMEM of the backward kernel, which takes more than the forward."""
    reach = (width - 1) * dilation
    span, lanes, halo = cut.span, up(cut.tile, LANES), up(reach, GROUP)
    tokens = 3 * span + 2 * halo  # x, dy, dx; history and its cotangent
    weights = 2 * up(width, 8) + 2 * 8
    documents = 8 * (2 * up(span, LANES) + up(halo, LANES))
    # While a block is worked on, the next one is fetched and the last one written.
    blocks = 2 * ((tokens + weights) * lanes + documents)
    kept = 2 * (halo + span) + up(reach, span)  # inputs and cotangents
    columns = up(max(span, halo), LANES) * LANES
    return 4 * (blocks + (kept + 8 * (width + 1)) * lanes + columns)


def layouts(form: Form) -> dict[str, Layout]:
    """The layout of every operand and result."""
    rows, seq, channels, halo = form.rows, form.seq, form.channels, form.halo
    span, tile, width, chunks = form.span, form.tile, form.width, form.chunks
    groups = rows // form.rows_per_weights

    def group(row):
        # Not `//`, which asks for signs, and there is none here.
        return jax.lax.div(row, np.int32(form.rows_per_weights))

    # Behind the last chunk, and before the first to be complete, nothing is moved.
    def now(step):
        return jnp.minimum(step, chunks - 1) if form.lag else step

    def complete(step):
        return jnp.maximum(step - form.lag, 0) if form.lag else step

    def tokens(chunk):
        return Layout(
            (rows, seq, channels),
            (None, span, tile),
            lambda r, t, s: (r, chunk(s), t),
        )

    def counts(chunk):
        lanes = up(span, LANES)
        return Layout(
            (rows, chunks, 1, lanes),
            (None, None, 1, lanes),
            lambda r, t, s: (r, chunk(s), 0, 0),
        )

    def of_row(height):
        return Layout(
            (rows, height, channels), (None, height, tile), lambda r, t, s: (r, 0, t)
        )

    def of_group(height):
        return Layout(
            (groups, height, channels),
            (None, height, tile),
            lambda r, t, s: (group(r), 0, t),
        )

    lanes = up(halo, LANES)
    return {
        **{"x": tokens(now), "y": tokens(now), "dy": tokens(now)},
        "dx": tokens(complete),
        **{"history": of_row(halo), "dhistory": of_row(halo)},
        **{"weight": of_group(width), "bias": of_group(1)},
        **{"dweight": of_row(width), "dbias": of_row(1)},
        **{"sees": counts(now), "seen_by": counts(complete)},
        "history_seen_by": Layout(
            (rows, 1, lanes), (None, 1, lanes), lambda r, t, s: (r, 0, 0)
        ),
    }


def sees(
    form: Form, document: Int[Array, "rows reach_and_seq"]
) -> Float[Array, "rows chunks 1 lanes"]:
    """Of how many taps the input is of the token's document.

    Documents are numbered in their order, so it is the nearest ones.
    """
    current = document[:, form.reach :]
    same = [
        document[:, form.reach - distance :][:, : form.seq] == current
        for distance in _distances(form)
    ]
    return _chunked(form, _count(same))


def seen_by(
    form: Form, document: Int[Array, "rows reach_and_seq"]
) -> tuple[Float[Array, "rows chunks 1 lanes"], Float[Array, "rows 1 halo"] | None]:
    """By how many taps an input is seen, the nearest ones; and those of the history.

    Of the history it counts those too that belong to no token.
    """
    later = jnp.pad(document, ((0, 0), (0, form.reach)), constant_values=-1)
    same = [
        later[:, distance:][:, : document.shape[1]] == document
        for distance in _distances(form)
    ]
    count = _count(same)
    of_inputs = _chunked(form, count[:, form.reach :])
    if not form.reach:
        return of_inputs, None
    before, behind = form.halo - form.reach, up(form.halo, LANES) - form.halo
    padding = ((0, 0), (before, behind))
    return of_inputs, jnp.pad(count[:, : form.reach], padding)[:, None]


def _distances(form):
    return [tap * form.dilation for tap in range(form.width)]


def _count(same):
    # Float, of which a TPU can turn rows into columns in all versions of jax.
    first, *others = [x.astype(jnp.float32) for x in same]
    return sum(others, first)


def _chunked(form: Form, x: Any) -> Any:
    padding = form.chunks * form.span - form.seq
    x = jnp.pad(x, ((0, 0), (0, padding))).reshape(form.rows, form.chunks, 1, form.span)
    lanes = up(form.span, LANES) - form.span
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, lanes)))
