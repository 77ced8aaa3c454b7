"""The forward kernel of the selective scan on a GPU, and what both directions share.

A block of 128 threads has one channel a thread. It walks along one row, a chunk of
tokens at each step of the grid, and within a chunk a few tokens at a time: their
states of one group are in registers, those of all groups in shared memory in between.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from .._pallas_gpu_launch import LANES


class Form(NamedTuple):
    """The static shape of one kernel's work."""

    softplus: bool
    seq: int  # tokens of a whole row, without padding
    splits: int  # kernel rows that one row is cut into
    span: int  # tokens of one of them, with padding
    chunk: int  # tokens of a grid step
    tokens: int  # tokens whose states are in registers at a time
    states: int  # states of a channel, with padding
    group: int  # states that are in registers at a time
    rows_per_weights: int  # kernel rows that share A, D and the bias


class Token(NamedTuple):
    """What the lanes know of one token before any state is involved."""

    time: Any  # index within the chunk
    valid: Any  # whether it is no padding; `None` if there is none
    reset: Any  # nonzero where the state is dropped; `None` if it never is
    u: Any
    before: Any  # the step size before softplus
    dt: Any
    x: Any  # what enters the state: dt * u


def lanes_of(place):
    """The channels of a block in an array of all channels."""
    return pl.ds(place.tile * LANES, LANES)


def sigmoid(x):
    return 1.0 / (1.0 + jnp.exp(-x))


def softplus(x):
    # Mosaic has no `log1p`, and `log(1 + e)` has no digits left where `e` is small, as
    # it is for most step sizes: log1p(e) = 2 artanh(s), whose series is short as s is
    # at most a third.
    e = jnp.exp(-jnp.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = jnp.full_like(x, 1 / 15)
    for k in (13, 11, 9, 7, 5, 3, 1):
        series = series * square + 1 / k
    return jnp.maximum(x, 0.0) + 2.0 * s * series


def tokens_of(form, place, start, bias, u_ref, delta_ref, reset_ref):
    """The `form.tokens` tokens of the chunk from `start` on."""
    return [
        _token(form, place, start + i, bias, u_ref, delta_ref, reset_ref)
        for i in range(form.tokens)
    ]


def _token(form, place, time, bias, u_ref, delta_ref, reset_ref):
    u = u_ref[time].astype(jnp.float32)
    before = delta_ref[time].astype(jnp.float32)
    if bias is not None:
        before = before + bias
    dt = softplus(before) if form.softplus else before
    valid = None
    if form.splits * form.span != form.seq:
        # A padded token has dt = 0: it decays nothing and adds nothing. (Padding with
        # zeros would not do: softplus(bias) is not zero.)
        position = place.chunk * form.chunk + time
        if form.splits > 1:
            position = position + jax.lax.rem(place.row, form.splits) * form.span
        valid = position < form.seq
        dt = jnp.where(valid, dt, 0.0)
    reset = None if reset_ref is None else reset_ref[time]
    return Token(time, valid, reset, u, before, dt, dt * u)


def keep(token, state):
    """`state`, or zeros if the token drops it: also if it is not finite."""
    return state if token.reset is None else jnp.where(token.reset != 0, 0.0, state)


def factor(token, rate):
    """By what a token multiplies a state."""
    decay = jnp.exp2(token.dt * rate)
    # A padded token by one, even where the rate is infinite.
    return decay if token.valid is None else jnp.where(token.valid, decay, 1.0)


def decayed(token, decay, states):
    """By what a token multiplies each state, and the states after that."""
    factors = [factor(token, rate) for rate in decay]
    return factors, [a * keep(token, h) for a, h in zip(factors, states, strict=True)]


def silu_gate(z_ref, time):
    """The gate of a token before its sigmoid, and that sigmoid."""
    z = z_ref[time].astype(jnp.float32)
    return z, sigmoid(z)


def scalars(ref, time, start, count):
    """`count` numbers of one token, the same for all lanes."""
    return [ref[time, start + n].astype(jnp.float32) for n in range(count)]


def rows_of(ref, start, count):
    return [ref[start + n] for n in range(count)]


def set_rows(ref, start, values):
    for n, value in enumerate(values):
        ref[start + n] = value


def _loop(count, step, carry):
    # Typed bounds, lest the index have 64 bits where those are enabled.
    return jax.lax.fori_loop(np.int32(0), np.int32(count), step, carry)


def each_state(form, do):
    """`do(n)` for every state, as a loop: nothing here is worth the code of many."""

    def step(n, carry):
        do(n)
        return carry

    _loop(form.states, step, None)


def each_part(form, do, count=None):
    """`do(s)` for every run of `form.tokens` tokens of the chunk, or the first ones."""

    def step(s, carry):
        do(s)
        return carry

    count = form.chunk // form.tokens if count is None else count
    if count:
        _loop(count, step, None)


def over_groups(form, do, sums):
    """`sums = do(first state, sums)` over the groups of states."""
    if form.group == form.states:
        return do(0, sums)
    groups = form.states // form.group
    return _loop(groups, lambda g, sums: do(g * form.group, sums), sums)


def weight(form, place, ref):
    """This block's part of a weight with one number a channel, or `None`."""
    if ref is None:
        return None
    return ref[place.row // form.rows_per_weights, lanes_of(place)]


def set_decay(form, place, a_ref, decay_ref):
    """Keep the block's part of A at hand, scaled for `exp2`."""
    row, lanes = place.row // form.rows_per_weights, lanes_of(place)

    def one(n):
        decay_ref[n] = a_ref[row, n, lanes] * math.log2(math.e)

    each_state(form, one)


def forward_body(
    form,
    place,
    *,
    u_ref,
    delta_ref,
    B_ref,
    C_ref,
    z_ref,
    reset_ref,
    A_ref,
    D_ref,
    bias_ref,
    initial_ref,
    y_ref,
    final_ref,
    saved_ref,
    elapsed_ref,
    decay_ref,
    state_ref,
    clock_ref,
):
    """One chunk of one row; without `C_ref` only the states are wanted, and no `y`.

    `elapsed_ref` takes the sum of the step sizes of a row, `clock_ref` is its scratch.
    """
    lanes = lanes_of(place)
    skip, bias = weight(form, place, D_ref), weight(form, place, bias_ref)

    @pl.when(place.first)
    def _():
        set_decay(form, place, A_ref, decay_ref)

        def start(n):
            if initial_ref is None:
                state_ref[n] = jnp.zeros(LANES, jnp.float32)
            else:
                state_ref[n] = initial_ref[place.row, n, lanes]

        each_state(form, start)
        if clock_ref is not None:
            clock_ref[...] = jnp.zeros(LANES, jnp.float32)

    if saved_ref is not None:

        def save(n):
            saved_ref[place.row, place.chunk, n, lanes] = state_ref[n]

        each_state(form, save)

    def part(s):
        tokens = tokens_of(
            form, place, s * form.tokens, bias, u_ref, delta_ref, reset_ref
        )

        def group(first, ys):
            decay = rows_of(decay_ref, first, form.group)
            h = rows_of(state_ref, first, form.group)
            out = []
            for i, token in enumerate(tokens):
                _, h = decayed(token, decay, h)
                B = scalars(B_ref, token.time, first, form.group)
                h = [p + b * token.x for p, b in zip(h, B, strict=True)]
                if C_ref is not None:
                    C = scalars(C_ref, token.time, first, form.group)
                    out.append(sum((c * v for c, v in zip(C, h, strict=True)), ys[i]))
            set_rows(state_ref, first, h)
            return tuple(out)

        ys = () if C_ref is None else (place.zeros(),) * form.tokens
        ys = over_groups(form, group, ys)
        for token, y in zip(tokens, ys, strict=bool(ys)):
            if skip is not None:
                y = y + skip * token.u
            if z_ref is not None:
                z, gate = silu_gate(z_ref, token.time)
                y = y * z * gate
            time = place.chunk * form.chunk + token.time
            y_ref[place.row, time, lanes] = y.astype(y_ref.dtype)
        if clock_ref is not None:
            clock_ref[...] += sum(token.dt for token in tokens)

    each_part(form, part)

    @pl.when(place.last)
    def _():
        def finish(n):
            final_ref[place.row, n, lanes] = state_ref[n]

        each_state(form, finish)
        if elapsed_ref is not None:
            elapsed_ref[place.row, lanes] = clock_ref[...]
