"""One token of the selective scan on a GPU: the states are read once and written once.

A block has some channels of one row with all their states, spread over its threads as
an accumulator of the matrix unit is: four neighbouring threads have the states of a
channel, so that what lies together in memory is read together, and the sum over the
states of a channel takes two exchanges between neighbours.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from .._pallas_gpu_launch import Launch, launch, struct_like
from ._operands import Operands
from ._pallas_gpu_forward import sigmoid, softplus


# What the matrix unit's accumulator is made of.
_CHANNELS = 64
_STATES = 8

# States of a channel that are in registers at a time.
_MOST = 64


class _Form(NamedTuple):
    """The static shape of the work."""

    softplus: bool
    states: int  # of a channel, with padding
    group: int  # states that are in registers at a time
    rows_per_weights: int


def step(
    operands: Operands, with_softplus: bool, *, interpret: bool
) -> tuple[Float[Array, "rows 1 d_inner"], Float[Array, "rows d_inner d_state"]]:
    """`y` and the state after the only token.

    **Arguments:**

    - `operands`: the arguments of the scan.
    - `with_softplus`: whether the step size passes through softplus.
    - `interpret`: run the kernel's interpreter, on any platform.
    """
    rows, _, d_inner = operands.u.shape
    groups, _, d_state = operands.A.shape
    width, states = _up(d_inner, _CHANNELS), _up(d_state, _STATES)
    struct = struct_like([x for x in operands if x is not None])
    form = _Form(
        softplus=with_softplus,
        states=states,
        group=max(g for g in range(_STATES, _MOST + 1, _STATES) if states % g == 0),
        rows_per_weights=rows // groups,
    )
    job = Launch(
        name="selective_scan_step",
        body=functools.partial(_body, form),
        grid=(width // _CHANNELS, rows, 1),
        streams={},
        whole=_padded(operands, width, states),
        outputs={
            "y": struct((rows, 1, width), operands.u.dtype),
            "final": struct((rows, width, states), jnp.float32),
        },
        scratch={},
        backwards=False,
        stages=1,
    )
    out = launch(job, interpret=interpret)
    return out["y"][..., :d_inner], out["final"][:, :d_inner, :d_state]


def _padded(operands, width, states):
    """The operands by name, in whole tiles; padded ones add nothing to what is kept."""

    def pad(x, *sizes):
        if x is None:
            return None
        lead = x.ndim - len(sizes)
        extra = [size - had for size, had in zip(sizes, x.shape[lead:], strict=True)]
        if not any(extra):
            return x
        return jnp.pad(x, [(0, 0)] * lead + [(0, e) for e in extra])

    reset = operands.reset
    return {
        "u": pad(operands.u, width),
        "delta": pad(operands.delta, width),
        "A": pad(operands.A, width, states),
        "B": pad(operands.B, states),
        "C": pad(operands.C, states),
        "D": pad(operands.D, width),
        "z": pad(operands.z, width),
        "bias": pad(operands.delta_bias, width),
        "initial": pad(operands.initial_state, width, states),
        "reset": None if reset is None else reset.astype(jnp.int32),
    }


def _up(size, multiple):
    return -(-size // multiple) * multiple


def _body(
    form,
    place,
    *,
    u_ref,
    delta_ref,
    A_ref,
    B_ref,
    C_ref,
    D_ref,
    z_ref,
    bias_ref,
    initial_ref,
    reset_ref,
    y_ref,
    final_ref,
):
    """The token of one row, some channels with all their states."""
    row, weights = place.row, place.row // form.rows_per_weights
    channels = pl.ds(place.tile * _CHANNELS, _CHANNELS)

    def of_channels(ref, *at):
        return place.load(ref, (*at, channels), (0,)).astype(jnp.float32)

    def for_states(x):
        shape = (_CHANNELS, form.group)
        return place.spread(jax.lax.broadcast_in_dim(x, shape, (0,)), (0, 1))

    u, dt = of_channels(u_ref, row, 0), of_channels(delta_ref, row, 0)
    if bias_ref is not None:
        dt = dt + of_channels(bias_ref, weights)
    if form.softplus:
        dt = softplus(dt)
    y = [] if D_ref is None else [u * of_channels(D_ref, weights)]
    time, x = for_states(dt * math.log2(math.e)), for_states(dt * u)

    for first in range(0, form.states, form.group):
        states = pl.ds(first, form.group)

        def of_states(ref, states=states):
            values = place.load(ref, (row, 0, states), (1,)).astype(jnp.float32)
            shape = (_CHANNELS, form.group)
            return place.spread(jax.lax.broadcast_in_dim(values, shape, (1,)), (0, 1))

        h = x * of_states(B_ref)
        if initial_ref is not None:
            A = place.load(A_ref, (weights, channels, states), (0, 1))
            before = place.load(initial_ref, (row, channels, states), (0, 1))
            if reset_ref is not None:
                before = jnp.where(reset_ref[row, 0] != 0, 0.0, before)
            h = h + jnp.exp2(A * time) * before
        place.store(final_ref, (row, channels, states), h)
        y.append(jnp.sum(h * of_states(C_ref), axis=1))
    y = sum(y[1:], y[0])
    if z_ref is not None:
        z = of_channels(z_ref, row, 0)
        y = y * z * sigmoid(z)
    place.store(y_ref, (row, 0, channels), y.astype(y_ref.dtype))
