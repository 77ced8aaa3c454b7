"""The selective scan in plain XLA, fast where autodiff is plain too.

The state of one token is small and the states of all tokens are not, so the whole
sequence of states is never written: an outer scan walks over chunks of about 32
tokens, an inner scan over the tokens of one, and `jax.checkpoint` around a chunk
makes every derivative recompute its states from the one at its start. Nothing here
has a custom rule, so every order and mode of derivative works by construction.

Channels lie on the last axis, where the processor's vector lanes are. A CPU reads one
row after the other, an accelerator all rows at once: the state of one row stays in the
CPU's cache, and a step that is too small for two threads is not torn between them
(measured: gradients take half to two thirds of the time from 2 to 32 rows).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._carry import start_of
from .._closure import spread
from ._operands import Operands, pack


# Long enough that the saved boundary states are few, short enough that the states of
# one chunk stay in the second-level cache: 16 to 64 measured within 30 % of each other.
_CHUNK = 32

# State elements a step, of all rows, up to which XLA keeps a step on one CPU thread.
_UNDIVIDED = 3072


def selective_scan(
    u: Float[Array, "*batch seq d_inner"],
    delta: Float[Array, "*batch seq d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, "*batch seq d_state"],
    C: Float[Array, "*batch seq d_state"],
    D: Float[Array, " d_inner"] | None,
    z: Float[Array, "*batch seq d_inner"] | None,
    delta_bias: Float[Array, " d_inner"] | None,
    delta_softplus: bool,
    initial_state: Float[Array, "*batch d_inner d_state"] | None,
    reset: Bool[Array, "*batch seq"] | None,
) -> tuple[Float[Array, "*batch seq d_inner"], Float[Array, "*batch d_inner d_state"]]:
    """`kernels.selective_scan` as a chunked, rematerialised `jax.lax.scan`."""
    operands = pack(u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    y, h = scan_rows(operands, delta_softplus)
    return y.reshape(u.shape), h.reshape(*u.shape[:-2], *A.shape)


def scan_rows(
    operands: Operands, softplus: bool
) -> tuple[Float[Array, "rows seq d_inner"], Float[Array, "rows d_inner d_state"]]:
    """The scan of all rows, `(y, final_state)`."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, reset = operands
    rows, dtype = u.shape[0], A.dtype

    def channels(weights):
        weights = spread(weights, rows)[:, None]
        return jnp.broadcast_to(weights, u.shape)

    dt = delta.astype(dtype)
    if delta_bias is not None:
        dt = dt + channels(delta_bias)
    if softplus:
        dt = jax.nn.softplus(dt)

    shape = (rows, *A.shape[1:])
    entering = (u[:, 0, :, None], dt[:, 0, :, None], spread(A, rows), B[:, :1])
    start = None if reset is None else reset[:, :1, None]
    h = start_of(initial_state, shape, dtype, *entering, start)
    # One matrix of rates for all rows stays where it is; one a row moves with its row.
    shared = A.shape[0] == 1
    rates = A.swapaxes(1, 2)
    y, h = _scan_rows(
        rates[0] if shared else None,
        (None if shared else spread(rates, rows), u, dt, B, C, h, reset),
    )
    if D is not None:
        y = y + channels(D) * u.astype(dtype)
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), h


def _scan_rows(shared, rows):
    """`_scan_row` over the leading axis of everything in `rows`."""

    def one(row):
        own, *streams = row
        return _scan_row(shared if own is None else own, *streams)

    u, h = rows[1], rows[5]
    count, seq = u.shape[:2]
    if count == 1:
        # A batch axis of one element keeps XLA's CPU backend from vectorising the step
        # (measured: 290 ms against 27 ms at 2048 tokens of 1536 channels).
        out = one(jax.tree.map(lambda x: x.reshape(x.shape[1:]), rows))
        return jax.tree.map(lambda x: x[None], out)
    # An axis that the types say is sharded can be mapped, but not walked along.
    sharded = jax.typeof(u).sharding.spec[0] is not None
    if seq == 1 or sharded or h.size <= _UNDIVIDED:
        return jax.vmap(one)(rows)
    return jax.lax.platform_dependent(
        rows, cpu=functools.partial(jax.lax.map, one), default=jax.vmap(one)
    )


def _scan_row(decay, u, dt, B, C, h, reset):
    seq = u.shape[0]
    count = -(-seq // _CHUNK)
    size = -(-seq // count)

    def chunks(x):
        # A padded token has dt = 0: it decays nothing and adds nothing.
        x = jnp.pad(x, [(0, count * size - seq)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    def step(h, token):
        x, dt, B, C, reset = token
        x, B, C = (v.astype(h.dtype) for v in (x, B, C))
        if reset is not None:
            h = jnp.where(reset, jnp.zeros_like(h), h)
        h = jnp.exp(dt[None] * decay) * h + (dt * x)[None] * B[:, None]
        return h, C @ h

    @jax.checkpoint
    def chunk(h, tokens):
        return jax.lax.scan(step, h, tokens)

    h, y = jax.lax.scan(chunk, h.T, jax.tree.map(chunks, (u, dt, B, C, reset)))
    return y.reshape(count * size, -1)[:seq], h.T
