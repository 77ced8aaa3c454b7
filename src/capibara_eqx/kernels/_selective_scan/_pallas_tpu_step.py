"""One token of the selective scan on a TPU: the states are read once and written once.

They are taken transposed, `(rows, d_state, d_inner)`. In their own order the states of
a channel would be on the lanes, and 16 of them take as much of a tile of 128 as 128 do:
512 bytes a channel to read and as many to write, where the states with channels on the
lanes take 64. To turn them round costs nothing: outside of a kernel the compiler
chooses how an array lies in memory, and of `(rows, d_inner, d_state)` it also puts the
channels on the lanes, so that `swapaxes` moves no byte (seen in what it makes for a
v5e). Next to the 128 bytes of its states a channel has `u`, `delta`, `z` and `y`, 16
bytes in float32, and `A`, 64 bytes that are read once for all rows that share it.

A grid step has some rows, as long as they share their weights, and some channels with
all their states; the rows take one after the other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._pallas_tpu import LANES, VMEM, Job, Layout, launch, loop, sigmoid, up
from ._operands import Operands
from ._pallas_tpu_forward import column, row, set_row, softplus


# Rows of a grid step: with 16 states in 512 channels, half a megabyte.
_ROWS = 16

# States of one row that are worked on together, eight registers.
_STATES = 8192


class _Form(NamedTuple):
    """The static shape of the work."""

    softplus: bool
    groups: int
    blocks: int  # of rows, in all groups
    height: int  # rows of a block
    d_inner: int
    tile: int  # channels of a grid step
    d_state: int


def step(
    operands: Operands, with_softplus: bool, *, interpret: bool
) -> tuple[Float[Array, "rows 1 d_inner"], Float[Array, "rows d_inner d_state"]]:
    """`y` and the state after the only token.

    **Arguments:**

    - `operands`: the arguments of the scan.
    - `with_softplus`: whether the step size passes through softplus.
    - `interpret`: run the kernel's interpreter, on any platform.
    """
    form = _form_of(operands, with_softplus)
    layouts = _layouts(form)
    rows = (form.height, form.tile)
    job = Job(
        body=functools.partial(_body, form),
        grid=(-(-form.d_inner // form.tile), form.blocks, 1),
        layout=lambda name: layouts[_KINDS.get(name, "wide")],
        inputs=_inputs(form, operands),
        outputs={"y": operands.u.dtype, "final": jnp.float32},
        scratch=dict.fromkeys(("dt_row", "x_row", "y_row"), rows),
        interpret=interpret,
    )
    out = launch(job)
    final = out["final"].reshape(-1, form.d_state, form.d_inner)
    return out["y"].reshape(operands.u.shape), final.swapaxes(1, 2)


def _form_of(operands, with_softplus):
    (rows, _, d_inner), (groups, _, d_state) = operands.u.shape, operands.A.shape
    tile = max(_STATES // up(d_state, 8) // LANES, 1) * LANES
    tile = min(tile, d_inner)
    # Blocks without padding, as this would be a copy of all states.
    heights = (h for h in range(_ROWS, 0, -1) if rows // groups % h == 0)
    height = next(h for h in heights if h == 1 or _bytes(h, tile, d_state) <= VMEM)
    cut = (groups, rows // height, height, d_inner, tile, d_state)
    return _Form(with_softplus, *cut)


def _bytes(height, tile, d_state):
    """VMEM of the kernel."""
    lanes, states = up(tile, LANES), up(d_state, 8)
    wide = 4 * up(height, 16) * lanes  # u, delta, z, y
    state = 2 * height * states * lanes + states * lanes + 2 * 8 * lanes
    blocks = 2 * (wide + state + 2 * states * LANES)
    return 4 * (blocks + 3 * up(height, 8) * lanes)


_KINDS = {
    **{"A": "rates", "D": "weight", "bias": "weight", "B": "narrow", "C": "narrow"},
    **{"initial": "states", "final": "states", "reset": "flags"},
}


def _layouts(form: _Form) -> dict[str, Layout]:
    groups, blocks, height, d_state = (
        form.groups,
        form.blocks,
        form.height,
        form.d_state,
    )
    d_inner, tile = form.d_inner, form.tile

    def group(block):
        return jax.lax.div(block, np.int32(blocks // groups))

    return {
        "wide": Layout(
            (blocks, height, d_inner), (None, height, tile), lambda t, b, _: (b, 0, t)
        ),
        "narrow": Layout(
            (blocks, d_state, height),
            (None, d_state, height),
            lambda t, b, _: (b, 0, 0),
        ),
        "states": Layout(
            (blocks, height, d_state, d_inner),
            (None, height, d_state, tile),
            lambda t, b, _: (b, 0, 0, t),
        ),
        "rates": Layout(
            (groups, d_state, d_inner),
            (None, d_state, tile),
            lambda t, b, _: (group(b), 0, t),
        ),
        "weight": Layout(
            (groups, 1, d_inner), (None, 1, tile), lambda t, b, _: (group(b), 0, t)
        ),
        "flags": Layout(
            (blocks, 1, height),
            (None, 1, height),
            lambda t, b, _: (b, 0, 0),
            scalar=True,
        ),
    }


def _inputs(form, operands):
    u, delta, A, B, C, D, z, delta_bias, initial_state, reset = operands
    shape = (form.blocks, form.height, -1)

    def wide(x):
        return None if x is None else x.reshape(shape)

    def narrow(x):
        # Rows on the lanes: the kernel wants a column of states.
        return x.astype(jnp.float32).reshape(shape).swapaxes(1, 2)

    inputs = {
        **{"u": wide(u), "delta": wide(delta), "z": wide(z)},
        **{"B": narrow(B), "C": narrow(C)},
        "D": None if D is None else D[:, None],
        "bias": None if delta_bias is None else delta_bias[:, None],
        # Of use only where there is a state to begin with.
        **dict.fromkeys(("A", "initial", "reset")),
    }
    if initial_state is not None:
        states = (form.blocks, form.height, form.d_state, form.d_inner)
        inputs["A"] = A.swapaxes(1, 2)
        inputs["initial"] = initial_state.swapaxes(1, 2).reshape(states)
        if reset is not None:
            flags = reset.astype(jnp.int32)
            inputs["reset"] = flags.reshape(shape).swapaxes(1, 2)
    return inputs


def _body(
    form,
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
    dt_row_ref,
    x_row_ref,
    y_row_ref,
):
    """The tokens of some rows; channels beyond the last one keep to themselves."""
    u, dt = u_ref[...].astype(jnp.float32), delta_ref[...].astype(jnp.float32)
    if bias_ref is not None:
        dt = dt + bias_ref[...]
    if form.softplus:
        dt = softplus(dt)
    dt_row_ref[...], x_row_ref[...] = dt, dt * u

    def of_row(i, _):
        h = row(x_row_ref, i) * column(B_ref[...], i)
        if initial_ref is not None:
            before = initial_ref[i]
            if reset_ref is not None:
                nothing = jnp.zeros_like(before)
                before = jnp.where(reset_ref[0, i] != 0, nothing, before)
            h = h + jnp.exp(row(dt_row_ref, i) * A_ref[...]) * before
        final_ref[i] = h
        out = column(C_ref[...], i) * h
        set_row(y_row_ref, i, jnp.sum(out, axis=0, keepdims=True))

    loop(form.height, of_row)
    y = y_row_ref[...]
    if D_ref is not None:
        y = y + D_ref[...] * u
    if z_ref is not None:
        z = z_ref[...].astype(jnp.float32)
        y = y * z * sigmoid(z)
    y_ref[...] = y.astype(y_ref.dtype)
