"""The backward kernel of the selective scan on a GPU.

The same blocks as forward, from the last chunk to the first. From the saved state that
enters a chunk its states are computed again: first those at the starts of its parts,
into shared memory, then part by part, last to first, those of the part's tokens in
registers, along which the cotangent of the state walks back.

The cotangents of B and C are sums over channels, that is over threads. A warp's
shuffles would take five steps for each number; here the threads lay their terms out in
shared memory and read them back turned round, one store and one load a term.
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._pallas_gpu_launch import LANES
from ._pallas_gpu_forward import (
    decayed,
    each_part,
    each_state,
    factor,
    keep,
    lanes_of,
    over_groups,
    rows_of,
    scalars,
    set_decay,
    set_rows,
    sigmoid,
    silu_gate,
    tokens_of,
    weight,
)


def ungated(token, dy_ref, z_ref):
    """The cotangent of the output before its gate."""
    dy = dy_ref[token.time].astype(jnp.float32)
    if z_ref is None:
        return dy
    z, gate = silu_gate(z_ref, token.time)
    return dy * z * gate


def _start(form, place, dfinal_ref, A_ref, decay_ref, carry_ref, dA_acc_ref, sums_ref):
    set_decay(form, place, A_ref, decay_ref)

    def start(n):
        carry_ref[n] = dfinal_ref[place.row, n, lanes_of(place)]
        if dA_acc_ref is not None:
            dA_acc_ref[n] = jnp.zeros(LANES, jnp.float32)

    each_state(form, start)
    if sums_ref is not None:
        for i in range(2):
            sums_ref[i] = jnp.zeros(LANES, jnp.float32)


def adjoint_body(
    form,
    place,
    *,
    u_ref,
    delta_ref,
    C_ref,
    z_ref,
    dy_ref,
    reset_ref,
    B_ref,
    A_ref,
    D_ref,
    bias_ref,
    dfinal_ref,
    dinitial_ref,
    elapsed_ref,
    decay_ref,
    carry_ref,
    clock_ref,
):
    """One chunk of one row, and of all cotangents only that of the state.

    It depends on neither B nor D. `elapsed_ref` takes the sum of the step sizes.
    """
    del B_ref, D_ref
    bias = weight(form, place, bias_ref)

    @pl.when(place.first)
    def _():
        _start(form, place, dfinal_ref, A_ref, decay_ref, carry_ref, None, None)
        clock_ref[...] = jnp.zeros(LANES, jnp.float32)

    def part(i):
        start = form.chunk - (i + 1) * form.tokens
        tokens = tokens_of(form, place, start, bias, u_ref, delta_ref, reset_ref)
        cotangents = [ungated(token, dy_ref, z_ref) for token in tokens]

        def group(first, sums):
            decay = rows_of(decay_ref, first, form.group)
            carry = rows_of(carry_ref, first, form.group)
            for token, dy in zip(reversed(tokens), reversed(cotangents), strict=True):
                C = scalars(C_ref, token.time, first, form.group)
                carry = [v + c * dy for v, c in zip(carry, C, strict=True)]
                carry = [
                    keep(token, factor(token, rate) * v)
                    for rate, v in zip(decay, carry, strict=True)
                ]
            set_rows(carry_ref, first, carry)
            return sums

        over_groups(form, group, ())
        clock_ref[...] += sum(token.dt for token in tokens)

    each_part(form, part)
    _finish(form, place, carry_ref, dinitial_ref)

    @pl.when(place.last)
    def _():
        elapsed_ref[place.row, lanes_of(place)] = clock_ref[...]


def _finish(form, place, from_ref, to_ref):
    @pl.when(place.last)
    def _():
        def finish(n):
            to_ref[place.row, n, lanes_of(place)] = from_ref[n]

        each_state(form, finish)


def backward_body(
    form,
    place,
    *,
    u_ref,
    delta_ref,
    B_ref,
    C_ref,
    z_ref,
    dy_ref,
    reset_ref,
    A_ref,
    D_ref,
    bias_ref,
    saved_ref,
    dfinal_ref,
    du_ref,
    ddelta_ref,
    dz_ref,
    dBC_ref,
    dA_ref,
    dD_ref,
    dbias_ref,
    dinitial_ref,
    decay_ref,
    carry_ref,
    dA_acc_ref,
    sums_ref,
    states_ref,
    terms_ref,
    folded_ref,
):
    """One chunk of one row.

    `states_ref` holds the states that enter each part of the chunk, `carry_ref` the
    cotangent of the state, `terms_ref` and `folded_ref` the sums over channels on
    their way, `sums_ref` the cotangents of D and of the bias so far.
    """
    lanes = lanes_of(place)
    skip, bias = weight(form, place, D_ref), weight(form, place, bias_ref)

    def tokens_from(start):
        return tokens_of(form, place, start, bias, u_ref, delta_ref, reset_ref)

    @pl.when(place.first)
    def _():
        _start(
            *(form, place, dfinal_ref, A_ref, decay_ref),
            *(carry_ref, dA_acc_ref, sums_ref),
        )

    _refill(form, place, tokens_from, B_ref, saved_ref, decay_ref, states_ref)

    def write(token, dy, dx, ddecay, y):
        """The cotangents of a token, from its sums over the states."""
        at = (place.row, place.chunk * form.chunk + token.time, lanes)
        du = dx * token.dt
        if skip is not None:
            du, y = du + skip * dy, y + skip * token.u
            sums_ref[0] += dy * token.u
        du_ref[at] = du.astype(du_ref.dtype)
        ddelta = dx * token.u + ddecay * math.log(2)
        if form.softplus:
            ddelta = ddelta * sigmoid(token.before)
        if token.valid is not None:
            # A padded token adds nothing, but it would if its step size were wider.
            ddelta = jnp.where(token.valid, ddelta, 0.0)
        if dbias_ref is not None:
            sums_ref[1] += ddelta
        ddelta_ref[at] = ddelta.astype(ddelta_ref.dtype)
        if z_ref is not None:
            z, gate = silu_gate(z_ref, token.time)
            slope = gate * (1.0 + z * (1.0 - gate))
            dz = dy_ref[token.time].astype(jnp.float32) * y * slope
            dz_ref[at] = dz.astype(dz_ref.dtype)

    def part(i):
        s = form.chunk // form.tokens - 1 - i
        tokens = tokens_from(s * form.tokens)
        cotangents = [ungated(token, dy_ref, z_ref) for token in tokens]

        def group(first, sums):
            sums = list(sums)
            decay = rows_of(decay_ref, first, form.group)
            h, trail = rows_of(states_ref.at[s], first, form.group), []
            for token in tokens:
                B = scalars(B_ref, token.time, first, form.group)
                factors, h = decayed(token, decay, h)
                trail.append((factors, h))
                h = [p + b * token.x for p, b in zip(h, B, strict=True)]
            carry = rows_of(carry_ref, first, form.group)
            dA = rows_of(dA_acc_ref, first, form.group)
            for t in reversed(range(form.tokens)):
                token, dy = tokens[t], cotangents[t]
                B = scalars(B_ref, token.time, first, form.group)
                C = scalars(C_ref, token.time, first, form.group)
                for n, (a, p) in enumerate(zip(*trail[t], strict=True)):
                    v = carry[n] + C[n] * dy
                    h_n = p + B[n] * token.x
                    terms_ref[:, n] = v * token.x
                    terms_ref[:, form.group + n] = dy * h_n
                    w = v * p
                    dA[n] = dA[n] + w * token.dt
                    sums[t] = _add(sums[t], (v * B[n], w * decay[n], C[n] * h_n))
                    carry[n] = keep(token, a * v)
                folded_ref[t] = _folded(form, place, terms_ref)
            set_rows(carry_ref, first, carry)
            set_rows(dA_acc_ref, first, dA)
            place.sync()
            at = place.chunk * (form.chunk // form.tokens) + s
            total = sum(folded_ref[:, k, :] for k in range(folded_ref.shape[1]))
            dBC_ref[place.row, place.tile, at, first // form.group] = total
            return tuple(sums)

        sums = ((place.zeros(),) * 3,) * form.tokens
        sums = over_groups(form, group, sums)
        for token, dy, of_token in zip(tokens, cotangents, sums, strict=True):
            write(token, dy, *of_token)

    each_part(form, part)
    _finish(form, place, carry_ref, dinitial_ref)
    _finish(form, place, dA_acc_ref, dA_ref)

    @pl.when(place.last)
    def _():
        for i, ref in enumerate((dD_ref, dbias_ref)):
            if ref is not None:
                ref[place.row, lanes] = sums_ref[i]


def _add(sums, terms):
    return tuple(s + t for s, t in zip(sums, terms, strict=True))


def _refill(form, place, tokens_from, B_ref, saved_ref, decay_ref, states_ref):
    """The states that enter each part of the chunk, from those that enter it."""

    def restore(n):
        states_ref[0, n] = saved_ref[place.row, place.chunk, n, lanes_of(place)]

    each_state(form, restore)

    def part(s):
        tokens = tokens_from(s * form.tokens)

        def group(first, sums):
            decay = rows_of(decay_ref, first, form.group)
            h = rows_of(states_ref.at[s], first, form.group)
            for token in tokens:
                B = scalars(B_ref, token.time, first, form.group)
                _, h = decayed(token, decay, h)
                h = [p + b * token.x for p, b in zip(h, B, strict=True)]
            set_rows(states_ref.at[s + 1], first, h)
            return sums

        over_groups(form, group, ())

    each_part(form, part, count=form.chunk // form.tokens - 1)


def _folded(form, place, terms_ref):
    """Sums over some of the lanes each, `(LANES // columns, columns)`.

    Each thread has written a row of terms, and now sums one column over every so many
    rows. A row has one number more than it has columns, so that the threads of a warp
    hardly ever meet in a bank of the shared memory, neither writing nor reading.
    """
    columns = 2 * form.group
    rows = LANES // columns
    place.sync()
    terms = [
        terms_ref[pl.ds(k * rows, rows), pl.ds(0, columns)] for k in range(columns)
    ]
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    place.sync()
    return terms[0]
