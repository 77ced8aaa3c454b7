"""The backward kernel of the selective scan on a TPU.

Chunks go by from the last to the first. In each, the states are computed once more from
the one that entered it, and the adjoint of the state walks back over them. With g the
cotangent of the state after a token, p its decayed state, x = dt u, and dy the
cotangent of y before its gate:

    h = p + x B,  p = exp(dt A) (state before),  y = C . h + D u,
    dx = g . B,  dB = x g,  dC = dy h,  dA = g p dt,  ddt = u dx + (g p) . A,

and the cotangent of the state before the token is exp(dt A) g, or zero at a reset.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._pallas_tpu import GROUP, loop, sigmoid
from ._pallas_tpu_forward import (
    channels_inside,
    column,
    common_of,
    decay_of,
    keep,
    load,
    only,
    place_of,
    row,
    set_row,
    tokens_of,
    walk,
)


class Rows(NamedTuple):
    """Scratches with one row for each token of a group."""

    dt: Any
    x: Any
    dy: Any  # the cotangent of y before its gate
    y: Any  # C . h
    dx: Any
    rate: Any  # (g p) . A


class Carry(NamedTuple):
    """What walks back from token to token; `dB` and `dC` have a column for each."""

    adjoint: Any
    dA: Any
    dB: Any
    dC: Any


def backward_body(
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
    saved_ref,
    dy_ref,
    dfinal_ref,
    du_ref,
    ddelta_ref,
    dB_ref,
    dC_ref,
    dz_ref,
    dA_ref,
    dD_ref,
    dbias_ref,
    dinitial_ref,
    adjoint_ref,
    decayed_ref,
    **rows_refs,
):
    """One chunk of one tile of channels; `rows_refs` are those of `Rows`."""
    place = place_of(form)
    inside = channels_inside(form, place, adjoint_ref.shape)

    @pl.when(place.first)
    def _():
        adjoint_ref[...] = only(inside, dfinal_ref[...])
        for ref in (dA_ref, dD_ref, dbias_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    rows = Rows(*(rows_refs[f"{name}_row_ref"] for name in Rows._fields))
    common = common_of(form, place, A_ref, B_ref, C_ref, reset_ref)
    streams = (u_ref, delta_ref, bias_ref)
    # By way of a scratch, as jax 0.7 inside `jax.shard_map` has no loop carry what was
    # read from an input: its type says along which axes it varies, that of a sum not.
    decayed_ref[0] = only(inside, saved_ref[...])
    _refill(form, place, common, streams, rows, decayed_ref)

    def of_group(count, carry):
        group = form.span // GROUP - 1 - count
        tokens = tokens_of(form, place, group, *streams)
        dy = _open(tokens, dy_ref, z_ref)
        rows.dt[...], rows.x[...] = tokens.dt, tokens.dt * tokens.u
        rows.dy[...] = dy
        carry = _walk_back(form, place, common, group, decayed_ref, rows, carry)
        _to_streams(form, tokens, rows, D_ref, du_ref, ddelta_ref, dbias_ref)
        _to_gate_and_skip(tokens, rows, D_ref, z_ref, dy_ref, dz_ref, dD_ref)
        return carry

    nothing = jnp.zeros_like(common.B)
    carry = Carry(adjoint_ref[...], jnp.zeros_like(common.A), nothing, nothing)
    carry = loop(form.span // GROUP, of_group, carry)
    adjoint_ref[...], dB_ref[...], dC_ref[...] = carry.adjoint, carry.dB, carry.dC
    dA_ref[...] += carry.dA

    if dinitial_ref is not None:

        @pl.when(place.last)
        def _():
            dinitial_ref[...] = carry.adjoint


def _refill(form, place, common, streams, rows, decayed_ref):
    """Compute the decayed states of a chunk once more, from the state in the first."""
    entering = decayed_ref[0]

    def visit(i, time, decayed, state):
        del i, state
        decayed_ref[time] = decayed

    scratch = (rows.dt, rows.x)
    walk(form, place, common, streams, scratch, entering, visit, lambda tokens: None)


def _open(tokens, dy_ref, z_ref):
    """The cotangent of y before its gate."""
    dy = load(dy_ref, tokens.rows, tokens.inside)
    if z_ref is None:
        return dy
    z = load(z_ref, tokens.rows, tokens.inside)
    return dy * z * sigmoid(z)


def _walk_back(form, place, common, group, decayed_ref, rows, carry):
    """The tokens of a group, from the last to the first."""
    lane = jax.lax.broadcasted_iota(jnp.int32, common.B.shape, 1)

    def of_token(count, carry):
        i = GROUP - 1 - count
        time = group * GROUP + i
        dt, x, dy = (row(ref, i) for ref in (rows.dt, rows.x, rows.dy))
        B, C = column(common.B, time), column(common.C, time)
        decayed = decayed_ref[time]
        state = decayed + x * B
        g = carry.adjoint + C * dy
        of_decay = g * decayed
        for ref, terms in (
            (rows.y, C * state),
            (rows.dx, B * g),
            (rows.rate, of_decay * common.A),
        ):
            set_row(ref, i, jnp.sum(terms, axis=0, keepdims=True))

        def with_column(sums, terms):
            return jnp.where(lane == time, jnp.sum(terms, axis=1, keepdims=True), sums)

        return Carry(
            keep(common, time, decay_of(form, place, common, time, dt) * g),
            carry.dA + of_decay * dt,
            with_column(carry.dB, x * g),
            with_column(carry.dC, dy * state),
        )

    return loop(GROUP, of_token, carry, unroll=not form.interpret)


def _to_streams(form, tokens, rows, D_ref, du_ref, ddelta_ref, dbias_ref):
    """The cotangents of u and delta, and that of the bias."""
    dx = rows.dx[...]
    du = dx * tokens.dt
    if D_ref is not None:
        du = du + D_ref[...] * rows.dy[...]
    du_ref[tokens.rows, :] = du.astype(du_ref.dtype)
    ddelta = dx * tokens.u + rows.rate[...]
    if form.softplus:
        ddelta = ddelta * sigmoid(tokens.before)
    # The step of a padded token was set to zero, whatever its delta.
    ddelta = only(tokens.inside, ddelta)
    ddelta_ref[tokens.rows, :] = ddelta.astype(ddelta_ref.dtype)
    if dbias_ref is not None:
        dbias_ref[...] += jnp.sum(ddelta, axis=0, keepdims=True)


def _to_gate_and_skip(tokens, rows, D_ref, z_ref, dy_ref, dz_ref, dD_ref):
    """The cotangents of z and of D."""
    if D_ref is not None:
        dD_ref[...] += jnp.sum(rows.dy[...] * tokens.u, axis=0, keepdims=True)
    if z_ref is not None:
        y = rows.y[...]
        if D_ref is not None:
            y = y + D_ref[...] * tokens.u
        z = load(z_ref, tokens.rows, tokens.inside)
        gate = sigmoid(z)
        dy = load(dy_ref, tokens.rows, tokens.inside)
        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
        dz_ref[tokens.rows, :] = dz.astype(dz_ref.dtype)
