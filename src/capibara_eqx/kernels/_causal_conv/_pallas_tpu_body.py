"""The kernels of the causal convolution on a TPU, forward and backward.

Chunks go by from the first to the last, and the inputs of one stay in VMEM behind the
last ones of the chunk before it, so that a tap is a window of rows some way up.

Backward as well: there a token asks for what is behind it, the tokens that see it, but
they in turn, to be computed again, for the inputs before them. So the cotangents before
the activation stay in VMEM, and a chunk's inputs get theirs when all that see it went
by, `lag` chunks later. Either way each stream is read once and each result written
once.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .._pallas_tpu import GROUP, LANES, loop, sigmoid


# Channels that are worked on together: what a group of tokens has of them fits in the
# registers.
_PIECE = 2 * LANES


def _pieces(form):
    """The channels of a tile, by pieces."""
    return [
        pl.ds(first, min(_PIECE, form.tile - first))
        for first in range(0, form.tile, _PIECE)
    ]


def _rows(group, first=0):
    """Of a group of tokens, in what has it from row `first` on, a whole group."""
    return pl.ds(pl.multiple_of(first + group * GROUP, GROUP), GROUP)


def _each(count, body):
    """`body` of the numbers up to `count`, one after the other."""

    def visit(index, _):
        body(index)

    loop(count, visit)


def _window(ref, first, group, lanes):
    """As `ref[_rows(group, first), lanes]`, from any row on."""
    skipped = first % 8
    start = pl.multiple_of(group * GROUP + (first - skipped), 8)
    if not skipped:
        return ref[pl.ds(start, GROUP), lanes]
    # Two tiles of rows and one more, as a load has to begin with a whole tile.
    return ref[pl.ds(start, GROUP + 8), lanes][skipped : skipped + GROUP]


def _clear(ref, first, rows):
    def clear(group):
        ref[_rows(group, first), :] = jnp.zeros((GROUP, ref.shape[1]), ref.dtype)

    _each(rows // GROUP, clear)


def _move_up(ref, first, rows, by):
    """Put `rows` rows from row `first` on in place of those `by` rows above."""

    # In ascending order: what is written over has been read before.
    def move(group):
        ref[_rows(group, first - by), :] = ref[_rows(group, first), :]

    _each(rows // GROUP, move)


def _to_column(counts_ref, column_ref):
    """From tokens on the lanes to tokens on the sublanes."""
    for first in range(0, counts_ref.shape[1], LANES):
        counts = counts_ref[:, first : first + LANES]
        square = lax.broadcast_in_dim(counts, (LANES, LANES), (0, 1))
        column_ref[first : first + LANES, :] = square.T


def _counts(documents_ref, column_ref, group):
    """What `_to_column` has for a group of tokens, `None` without documents."""
    return None if documents_ref is None else column_ref[_rows(group), :1]


def _only(counts, tap, x):
    """`x` where the tap is within the document."""
    if counts is None or tap == 0:
        return x
    return jnp.where(counts > np.float32(tap), x, jnp.zeros_like(x))


def _taps(form, weight_ref, lanes):
    """By their distance from the current token."""
    last = form.width - 1
    return [weight_ref[last - tap : last - tap + 1, lanes] for tap in range(form.width)]


class _Inputs:
    """The inputs of a chunk in VMEM, behind those before it."""

    def __init__(self, form, step, ref, history_ref, sees_ref, column_ref):
        self.form, self.step, self.ref = form, step, ref
        self.sees_ref, self.column_ref = sees_ref, column_ref
        if sees_ref is not None:
            _to_column(sees_ref, column_ref)
        if history_ref is None:
            return

        @pl.when(step == 0)
        def _():
            def fill(group):
                ref[_rows(group), :] = history_ref[_rows(group), :].astype(jnp.float32)

            _each(form.halo // GROUP, fill)

        @pl.when(step > 0)
        def _():
            _move_up(ref, form.span, form.halo, form.span)

    def only_tokens(self, group, x):
        """`x`, and zeros in place of padding, which may hold anything, also NaN."""
        form = self.form
        if form.seq % form.span == 0:
            return x
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        time = self.step * form.span + group * GROUP + row
        return jnp.where(time < form.seq, x, jnp.zeros_like(x))

    def put(self, group, lanes, x):
        self.ref[_rows(group, self.form.halo), lanes] = x

    def seen(self, group, lanes):
        """What the tokens of a group see, by tap; only groups up to it are there."""
        counts = _counts(self.sees_ref, self.column_ref, group)
        for tap in range(self.form.width):
            first = self.form.halo - tap * self.form.dilation
            yield _only(counts, tap, _window(self.ref, first, group, lanes))

    def convolved(self, taps, bias_ref, group, lanes):
        seen = self.seen(group, lanes)
        terms = [tap * x for tap, x in zip(taps, seen, strict=True)]
        if bias_ref is None:
            return sum(terms[1:], terms[0])
        return sum(terms, bias_ref[:, lanes])


def forward_body(
    form,
    *,
    x_ref,
    weight_ref,
    bias_ref,
    history_ref,
    sees_ref,
    y_ref,
    inputs_ref,
    column_ref,
):
    """One chunk of one tile of channels.

    Padding may hold anything: no token that is there sees a later one.
    """
    step = pl.program_id(2)
    inputs = _Inputs(form, step, inputs_ref, history_ref, sees_ref, column_ref)
    for lanes in _pieces(form):
        taps = _taps(form, weight_ref, lanes)

        def of_group(group, lanes=lanes, taps=taps):
            rows = _rows(group)
            inputs.put(group, lanes, x_ref[rows, lanes].astype(jnp.float32))
            y = inputs.convolved(taps, bias_ref, group, lanes)
            y = y * sigmoid(y) if form.silu else y
            y_ref[rows, lanes] = y.astype(y_ref.dtype)

        _each(form.span // GROUP, of_group)


def backward_body(
    form,
    *,
    x_ref,
    weight_ref,
    bias_ref,
    history_ref,
    sees_ref,
    seen_by_ref,
    history_seen_by_ref,
    dy_ref,
    dx_ref,
    dhistory_ref,
    dweight_ref,
    dbias_ref,
    inputs_ref,
    cotangents_ref,
    sums_ref,
    column_ref,
):
    """One chunk of tokens of one tile of channels, and the inputs of an earlier one.

    `cotangents_ref` has a halo, always zero, for the tokens before the first one, the
    cotangents of `lag` chunks, and behind those the chunk's.
    """
    step, lag, chunks = pl.program_id(2), form.lag, form.chunks
    halo, kept = form.halo, form.lag * form.span

    @pl.when(step == 0)
    def _():
        _clear(cotangents_ref, 0, halo + kept)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(step > 0)
    def _():
        _move_up(cotangents_ref, halo + form.span, kept, form.span)

    @pl.when(step < chunks)
    def _():
        inputs = _Inputs(form, step, inputs_ref, history_ref, sees_ref, column_ref)
        refs = (x_ref, dy_ref, weight_ref, bias_ref, cotangents_ref, sums_ref)
        _of_tokens(form, inputs, *refs)

    @pl.when(step >= chunks)
    def _():
        _clear(cotangents_ref, halo + kept, form.span)

    refs = (weight_ref, cotangents_ref, column_ref)

    @pl.when(step >= lag)
    def _():
        _of_inputs(form, halo, *refs, seen_by_ref, dx_ref)

    if dhistory_ref is not None:

        @pl.when(step == lag)
        def _():
            _of_inputs(form, 0, *refs, history_seen_by_ref, dhistory_ref)

    @pl.when(step == chunks - 1)
    def _():
        _finish(form, sums_ref, dweight_ref, dbias_ref)


def _of_tokens(
    form, inputs, x_ref, dy_ref, weight_ref, bias_ref, cotangents_ref, sums_ref
):
    """The cotangents before the activation, and what they add to the weights'."""
    behind = form.halo + form.lag * form.span
    for lanes in _pieces(form):
        taps = _taps(form, weight_ref, lanes)

        def of_group(group, lanes=lanes, taps=taps):
            rows = _rows(group)
            x, dy = (
                inputs.only_tokens(group, ref[rows, lanes].astype(jnp.float32))
                for ref in (x_ref, dy_ref)
            )
            inputs.put(group, lanes, x)
            if form.silu:
                y = inputs.convolved(taps, bias_ref, group, lanes)
                gate = sigmoid(y)
                dy = dy * (gate + y * gate * (1.0 - gate))
            cotangents_ref[_rows(group, behind), lanes] = dy
            terms = [dy * seen for seen in inputs.seen(group, lanes)]
            # Of padding too there is a term, which is NaN if what it sees is infinite.
            terms = [inputs.only_tokens(group, term) for term in terms]
            terms += [] if bias_ref is None else [dy]
            for index, term in enumerate(terms):
                sums_ref[index, :, lanes] += term[:8] + term[8:]

        _each(form.span // GROUP, of_group)


def _of_inputs(form, first, weight_ref, cotangents_ref, column_ref, seen_by_ref, out):
    """The cotangents of the inputs whose place is from row `first` on."""
    if seen_by_ref is not None:
        _to_column(seen_by_ref, column_ref)
    for lanes in _pieces(form):
        taps = _taps(form, weight_ref, lanes)

        def of_group(group, lanes=lanes, taps=taps):
            counts = _counts(seen_by_ref, column_ref, group)
            terms = []
            for tap, weight in enumerate(taps):
                at = first + tap * form.dilation
                dy = _window(cotangents_ref, at, group, lanes)
                terms.append(weight * _only(counts, tap, dy))
            dx = sum(terms[1:], terms[0])
            out[_rows(group), lanes] = dx.astype(out.dtype)

        _each(out.shape[0] // GROUP, of_group)


def _finish(form, sums_ref, dweight_ref, dbias_ref):
    """The sums over the eight rows that were kept apart."""
    last = form.width - 1
    for tap in range(form.width):
        total = jnp.sum(sums_ref[tap], axis=0, keepdims=True)
        dweight_ref[last - tap : last - tap + 1, :] = total
    if dbias_ref is not None:
        dbias_ref[...] = jnp.sum(sums_ref[form.width], axis=0, keepdims=True)
