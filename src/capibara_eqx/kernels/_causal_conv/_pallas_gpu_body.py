"""The kernels of the causal convolution on a GPU, forward and backward.

A block of 128 threads takes a run of tokens of one row and one or two neighbouring
channels a thread. All that the run sees is loaded into registers at once, so that many
loads are on their way together, and every sum is taken there: nothing passes through
shared memory. Neighbouring runs read a few tokens twice, which the caches serve.

With a dilation the tokens of a run are that far apart: those of one remainder are a
sequence by themselves, which sees no other token and knows no dilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


class Form(NamedTuple):
    """The static shape of one kernel's work."""

    seq: int
    width: int
    dilation: int
    silu: bool
    lanes: int  # channels of a block
    tokens: int  # of a run
    runs: int  # that a block takes one after the other
    rows_per_weights: int

    @property
    def reach(self):
        return (self.width - 1) * self.dilation

    @property
    def blocks(self):
        """Blocks of one row and remainder."""
        return -(-self.seq // (self.dilation * self.tokens * self.runs))

    @property
    def chunks(self):
        """Blocks of one row."""
        return self.dilation * self.blocks

    @property
    def is_whole(self):
        return self.seq == self.chunks * self.tokens * self.runs


class _Run:
    """A run of tokens of one remainder; token `i` is behind it, or before if negative.

    **Attributes:**

    - `first`: number of its first token among those of its remainder.
    - `begins`: whether that is none, so that history is before it.
    """

    def __init__(self, form, place, index):
        self.form, self.row = form, place.row
        self.lanes = pl.ds(place.tile * form.lanes, form.lanes)
        block = jax.lax.div(place.chunk, np.int32(form.dilation))
        self.remainder = jax.lax.rem(place.chunk, np.int32(form.dilation))
        self.first = (block * form.runs + index) * form.tokens
        self.begins = self.first == 0

    def time(self, i):
        return self.remainder + (self.first + i) * self.form.dilation

    def valid(self, i):
        """Whether there is such a token; `None` if there always is.

        The last runs of a block may be all behind the end, with what is before them.
        """
        if i < self.form.tokens and self.form.is_whole:
            return None
        return self.time(i) < self.form.seq

    def load(self, ref, i):
        """What `ref` has at a token, zeros if there is none."""
        valid = self.valid(i)
        if valid is None:
            return _load(ref, self.row, self.time(i), self.lanes)
        time = jnp.minimum(self.time(i), self.form.seq - 1)
        return jnp.where(valid, _load(ref, self.row, time, self.lanes), 0.0)

    def store(self, ref, i, value):
        def write():
            ref[self.row, self.time(i), self.lanes] = value.astype(ref.dtype)

        valid = self.valid(i)
        if valid is None:
            write()
        else:
            pl.when(valid)(write)

    def before(self, i):
        """Where in the history the input `i` is, if the run begins the sequence."""
        return self.remainder + (self.form.width - 1 + i) * self.form.dilation

    def inputs(self, x_ref, history_ref, count):
        """By their numbers, the inputs that the first `count` tokens see."""
        halo = range(1 - self.form.width, 0)

        # Inside `jax.shard_map` what was just loaded has another type than what was
        # computed, and both branches must have one: hence `where`, for nothing else.
        def from_history():
            # As exact as in the XLA form, which reads both in the dtype of `x`.
            dtype = x_ref.dtype
            found = (
                _load(history_ref, self.row, self.before(i), self.lanes, dtype)
                for i in halo
            )
            return tuple(jnp.where(self.begins, value, 0.0) for value in found)

        def from_x():
            found = (self.load(x_ref, i) for i in halo)
            return tuple(jnp.where(self.begins, 0.0, value) for value in found)

        inputs = {i: self.load(x_ref, i) for i in range(count)}
        if len(halo):
            before = jax.lax.cond(self.begins, from_history, from_x)
            inputs.update(zip(halo, before, strict=True))
        return inputs

    def documents(self, ref, count):
        """By their numbers, the documents of these inputs; nothing if there are none.

        Numbers are all that is wanted, also of tokens that are not there.
        """
        if ref is None:
            return {}
        last = self.form.reach + self.form.seq - 1
        return {
            i: ref[self.row, jnp.minimum(self.form.reach + self.time(i), last)]
            for i in range(1 - self.form.width, count)
        }


def _load(ref, row, time, lanes, dtype=None):
    value = ref[row, time, lanes]
    return (value if dtype is None else value.astype(dtype)).astype(jnp.float32)


def _seen(documents, at, place, value):
    """`value`, or zeros if the token `at` does not see the input at `place`."""
    if not documents or place == at:
        return value
    return jnp.where(documents[place] == documents[at], value, 0.0)


def _weights(form, place, lanes, weight_ref, bias_ref):
    """The taps by their distance from the current token, and the bias or `None`."""
    group = jax.lax.div(place.row, np.int32(form.rows_per_weights))
    taps = [
        weight_ref[group, form.width - 1 - distance, lanes].astype(jnp.float32)
        for distance in range(form.width)
    ]
    if bias_ref is None:
        return taps, None
    return taps, bias_ref[group, lanes].astype(jnp.float32)


def _convolved(taps, bias, inputs, documents, i):
    """The convolution at token `i` before any activation."""
    terms = [
        tap * _seen(documents, i, i - distance, inputs[i - distance])
        for distance, tap in enumerate(taps)
    ]
    return sum(terms[1:], terms[0]) if bias is None else sum(terms, bias)


def _over_runs(form, one_run, carry):
    if form.runs == 1:
        return one_run(0, carry)
    # Typed bounds, lest the index have 64 bits where those are enabled.
    return jax.lax.fori_loop(np.int32(0), np.int32(form.runs), one_run, carry)


def _sigmoid(x):
    return 1.0 / (1.0 + jnp.exp(-x))


def forward_body(
    form,
    place,
    *,
    x_ref,
    weight_ref,
    bias_ref,
    history_ref,
    document_ref,
    y_ref,
):
    """Some runs of one row."""
    lanes = pl.ds(place.tile * form.lanes, form.lanes)
    taps, bias = _weights(form, place, lanes, weight_ref, bias_ref)

    def one_run(index, _):
        run = _Run(form, place, index)
        inputs = run.inputs(x_ref, history_ref, form.tokens)
        documents = run.documents(document_ref, form.tokens)
        for i in range(form.tokens):
            y = _convolved(taps, bias, inputs, documents, i)
            run.store(y_ref, i, y * _sigmoid(y) if form.silu else y)

    _over_runs(form, one_run, None)


def backward_body(
    form,
    place,
    *,
    x_ref,
    weight_ref,
    bias_ref,
    history_ref,
    document_ref,
    dy_ref,
    dx_ref,
    dhistory_ref,
    dweight_ref,
):
    """Some runs of one row; `dweight_ref` takes what they add to the taps and the bias.

    The tokens behind a run that see it are computed there once more.
    """
    lanes = pl.ds(place.tile * form.lanes, form.lanes)
    taps, bias = _weights(form, place, lanes, weight_ref, bias_ref)
    seen_by = form.tokens + form.width - 1

    def one_run(index, sums):
        run = _Run(form, place, index)
        inputs = run.inputs(x_ref, history_ref, seen_by if form.silu else form.tokens)
        documents = run.documents(document_ref, seen_by)
        cotangents = []
        for i in range(seen_by):
            before = None
            if form.silu:
                before = _convolved(taps, bias, inputs, documents, i)
            cotangents.append(_through_activation(run.load(dy_ref, i), before))
        _write_inputs(run, taps, cotangents, documents, dx_ref, dhistory_ref)
        for i in range(form.tokens):
            sums = _with_token(sums, cotangents[i], inputs, documents, i)
        return sums

    sums = (place.zeros(form.lanes),) * (form.width + (bias is not None))
    sums = _over_runs(form, one_run, sums)
    for distance in range(form.width):
        tap = form.width - 1 - distance
        dweight_ref[place.row, place.chunk, tap, lanes] = sums[distance]
    if bias is not None:
        dweight_ref[place.row, place.chunk, form.width, lanes] = sums[form.width]


def _through_activation(dy, before):
    """The cotangent before the activation, of which `before` is the argument."""
    if before is None:
        return dy
    gate = _sigmoid(before)
    return dy * (gate + before * gate * (1.0 - gate))


def _with_token(sums, cotangent, inputs, documents, i):
    """The sums for the taps, by distance, and for the bias if it has one, so far."""
    width = 1 - min(inputs)
    terms = [
        cotangent * _seen(documents, i, i - distance, inputs[i - distance])
        for distance in range(width)
    ]
    terms += [cotangent] * (len(sums) - width)
    return tuple(s + t for s, t in zip(sums, terms, strict=True))


def _write_inputs(run, taps, cotangents, documents, dx_ref, dhistory_ref):
    """The cotangents of a run's inputs, and of the history if it begins there."""

    def cotangent(place):
        terms = [
            tap
            * _seen(documents, place + distance, place, cotangents[place + distance])
            for distance, tap in enumerate(taps)
            if place + distance >= 0
        ]
        return sum(terms[1:], terms[0])

    for i in range(run.form.tokens):
        run.store(dx_ref, i, cotangent(i))
    if dhistory_ref is None:
        return

    @pl.when(run.begins)
    def _():
        for i in range(1 - run.form.width, 0):
            at = (run.row, run.before(i), run.lanes)
            dhistory_ref[at] = cotangent(i).astype(dhistory_ref.dtype)
