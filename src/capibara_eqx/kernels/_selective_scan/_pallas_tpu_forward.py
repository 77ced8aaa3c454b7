"""The forward kernel of the selective scan on a TPU, and what both directions share.

Tokens go by in groups. What does not depend on the state is computed for a whole group
at once and put into scratches of one row a token; then one token after the other passes
through the state and leaves its own rows; what only depends on those is again computed
for the group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._pallas_tpu import GROUP, loop, sigmoid


class Place(NamedTuple):
    """Where in the grid a body runs."""

    tile: Any
    chunk: Any
    first: Any  # whether this is the first chunk of the row to go by
    last: Any


class Tokens(NamedTuple):
    """A group of tokens, before any state is involved."""

    rows: Any  # their rows in the blocks of a chunk
    inside: Any  # where there is no padding; `None` if there is none anywhere
    u: Any
    before: Any  # the step size before softplus
    dt: Any


class Common(NamedTuple):
    """What the tokens of a chunk share; `B` and `C` have a column for each of them."""

    A: Any
    B: Any
    C: Any
    reset_ref: Any


def place_of(form):
    step = pl.program_id(2)
    return Place(
        tile=pl.program_id(1),
        chunk=form.chunk(step),
        first=step == 0,
        last=step == form.chunks - 1,
    )


def softplus(x):
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def only(where, x):
    """`x`, and zeros where a block has padding: that may hold anything, also NaN."""
    return x if where is None else jnp.where(where, x, 0.0)


def channels_inside(form, place, shape):
    """Which lanes of a tile are channels, `None` if all are."""
    if form.d_inner % form.tile == 0:
        return None
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return place.tile * form.tile + lane < form.d_inner


def _inside(form, place, group):
    shape = (GROUP, form.tile)
    channels = channels_inside(form, place, shape)
    if form.seq % form.span == 0:
        return channels
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    tokens = place.chunk * form.span + group * GROUP + row < form.seq
    return tokens if channels is None else tokens & channels


def load(ref, rows, inside):
    return only(inside, ref[rows, :].astype(jnp.float32))


def tokens_of(form, place, group, u_ref, delta_ref, bias_ref):
    rows = pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)
    inside = _inside(form, place, group)
    before = load(delta_ref, rows, inside)
    if bias_ref is not None:
        before = before + bias_ref[...]
    # A padded token has dt = 0: it decays nothing and adds nothing. (Padding with zeros
    # would not do: softplus(bias) is not zero.)
    dt = only(inside, softplus(before) if form.softplus else before)
    return Tokens(rows, inside, load(u_ref, rows, inside), before, dt)


def common_of(form, place, A_ref, B_ref, C_ref, reset_ref):
    A = A_ref[...]
    A = only(channels_inside(form, place, A.shape), A)
    return Common(A, B_ref[...], C_ref[...], reset_ref)


def column(values, time):
    """One column of a matrix, by a sum that adds nothing to it."""
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.sum(jnp.where(lane == time, values, 0.0), axis=1, keepdims=True)


def row(ref, i):
    return ref[pl.ds(i, 1), :]


def set_row(ref, i, x):
    ref[pl.ds(i, 1), :] = x


def keep(common, time, state):
    """`state`, or zeros if the token drops it: also if it is not finite."""
    if common.reset_ref is None:
        return state
    return jnp.where(common.reset_ref[0, time] != 0, jnp.zeros_like(state), state)


def decay_of(form, place, common, time, dt):
    """By what a token multiplies the states."""
    decay = jnp.exp(dt * common.A)
    if form.seq % form.span == 0:
        return decay
    # A padded token by one, even where the rate is infinite.
    return jnp.where(place.chunk * form.span + time < form.seq, decay, 1.0)


def walk(form, place, common, streams, scratch, state, visit, finish):
    """Pass the tokens of a chunk through the state; returns what is left of it.

    **Arguments:**

    - `streams`: the references of u, delta and the bias.
    - `scratch`: one row a token for step sizes, and one for what enters the state.
    - `visit`: called with a token's index in the group and in the chunk, its decayed
        state and the state after it.
    - `finish`: called with the `Tokens` of a group after those.
    """
    dt_ref, x_ref = scratch

    def of_group(group, state):
        tokens = tokens_of(form, place, group, *streams)
        dt_ref[...] = tokens.dt
        x_ref[...] = tokens.dt * tokens.u

        def of_token(i, state):
            time = group * GROUP + i
            decay = decay_of(form, place, common, time, row(dt_ref, i))
            decayed = decay * keep(common, time, state)
            state = decayed + row(x_ref, i) * column(common.B, time)
            visit(i, time, decayed, state)
            return state

        state = loop(GROUP, of_token, state, unroll=not form.interpret)
        finish(tokens)
        return state

    return loop(form.span // GROUP, of_group, state)


def forward_body(
    form,
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
    state_ref,
    dt_row_ref,
    x_row_ref,
    y_row_ref,
):
    """One chunk of one tile of channels; `y_row_ref` has the rows of C . h."""
    place = place_of(form)

    @pl.when(place.first)
    def _():
        start = jnp.zeros_like if initial_ref is None else lambda _: initial_ref[...]
        state_ref[...] = start(state_ref)

    if saved_ref is not None:
        saved_ref[...] = state_ref[...]
    common = common_of(form, place, A_ref, B_ref, C_ref, reset_ref)

    def visit(i, time, decayed, state):
        del decayed
        out = column(common.C, time) * state
        set_row(y_row_ref, i, jnp.sum(out, axis=0, keepdims=True))

    def finish(tokens):
        y = y_row_ref[...]
        if D_ref is not None:
            y = y + D_ref[...] * tokens.u
        if z_ref is not None:
            z = load(z_ref, tokens.rows, tokens.inside)
            y = y * z * sigmoid(z)
        y_ref[tokens.rows, :] = y.astype(y_ref.dtype)

    streams, scratch = (u_ref, delta_ref, bias_ref), (dt_row_ref, x_row_ref)
    state = state_ref[...]
    state = walk(form, place, common, streams, scratch, state, visit, finish)
    state_ref[...] = state

    @pl.when(place.last)
    def _():
        final_ref[...] = state
