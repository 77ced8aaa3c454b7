"""The state space dual as products of matrices over chunks of tokens.

Within a chunk the map from inputs to outputs is a lower triangular matrix a head, $C_i
B_j^\\top$ times the decay from $j$ to $i$: two products, as in attention. What came
before a chunk is a state. A scan walks over the chunks; `jax.checkpoint` makes every
derivative recompute a chunk from the state at its start, so that memory is that of one
chunk and of the states between them, and every order and mode of derivative works by
construction.

All decays are exponentials of differences of running sums that are masked before they
are raised: one of the masked half could overflow, and infinity times zero is no number.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...internal import accumulator_dtype
from .._carry import start_of


_CHUNK = 64


def ssd(
    x: Float[Array, "*batch seq n_heads head_dim"],
    log_decay: Float[Array, "*batch seq n_heads"],
    B: Float[Array, "*batch seq n_groups d_state"],
    C: Float[Array, "*batch seq n_groups d_state"],
    coefficient: Float[Array, "*batch seq n_heads"] | None,
    initial_state: Float[Array, "*batch n_heads head_dim d_state"] | None,
    reset: Bool[Array, "*batch seq"] | None,
    chunk_size: int | None,
) -> tuple[
    Float[Array, "*batch seq n_heads head_dim"],
    Float[Array, "*batch n_heads head_dim d_state"],
]:
    """`kernels.ssd` as a scan over chunks, or as one plain step for one token."""
    *batch, seq, n_heads, head_dim = x.shape
    n_groups, d_state = B.shape[-2:]
    operands = (x, log_decay, B, C, coefficient, initial_state)
    dtype = accumulator_dtype(*(v.dtype for v in operands if v is not None))
    count = math.prod(batch)

    def rows(v) -> Any:
        return None if v is None else v.reshape(count, *v.shape[len(batch) :])

    def grouped(v) -> Any:
        if v is not None:
            heads = (n_groups, n_heads // n_groups)
            v = v.reshape(count, seq, *heads, *v.shape[len(batch) + 2 :])
        return v

    tokens = _Tokens(
        grouped(x),
        grouped(log_decay.astype(dtype)),
        grouped(coefficient),
        *map(rows, (B, C, reset)),
    )
    shape = (count, n_groups, n_heads // n_groups, head_dim, d_state)
    h = None if initial_state is None else initial_state.reshape(shape)
    h = start_of(h, shape, dtype, *_entering(tokens))
    if seq == 1:
        y, h = _token(h, jax.tree.map(lambda v: v[:, 0], tokens))
    else:
        y, h = _chunks(h, tokens, seq, _CHUNK if chunk_size is None else chunk_size)
    h = h.reshape(*batch, n_heads, head_dim, d_state)
    return y.reshape(x.shape).astype(x.dtype), h


class _Tokens(NamedTuple):
    """What is read, in whatever dtype it came but for the decays."""

    x: Float[Array, "row seq group head head_dim"]
    log_decay: Float[Array, "row seq group head"]
    coefficient: Float[Array, "row seq group head"] | None
    B: Float[Array, "row seq group d_state"]
    C: Float[Array, "row seq group d_state"]
    reset: Bool[Array, "row seq"] | None


# How many axes of each count what is multiplied apart: groups and their heads.
_APART = (2, 2, 2, 1, 1, 0)


def _entering(tokens):
    """The first token, in shapes that broadcast to that of the state."""
    first = jax.tree.map(lambda v: v[:, 0], tokens)
    x, log_decay, coefficient, B, C, reset = first
    yield x[..., None]
    for v in (log_decay, coefficient):
        yield None if v is None else v[..., None, None]
    for v in (B, C):
        yield v[:, :, None, None]
    yield None if reset is None else reset[:, None, None, None, None]


def _token(h, token):
    """The recurrence itself, for one token of every row."""
    x, log_decay, coefficient, B, C, reset = token
    x, B, C = (v.astype(h.dtype) for v in (x, B, C))
    if coefficient is not None:
        x = x * coefficient.astype(h.dtype)[..., None]
    if reset is not None:
        reset = reset[:, None, None, None, None]
        h = jnp.where(reset, jnp.zeros_like(h), h)
    # From the state before the token: XLA would make the new one twice. By products: a
    # sum of products took a CPU seven times as long.
    decay = jnp.exp(log_decay)[..., None]
    y = decay * jnp.einsum("rgkpn,rgn->rgkp", h, C)
    y = y + x * jnp.einsum("rgn,rgn->rg", B, C)[..., None, None]
    return y, decay[..., None] * h + x[..., None] * B[:, :, None, None]


def _chunks(h, tokens, seq, chunk_size):
    count = -(-seq // chunk_size)
    size = -(-seq // count)

    def chunks(v, apart) -> Any:
        """`(chunk, row, *apart, token, ...)`."""
        if v is None:
            return None
        # A padded token decays nothing and adds nothing.
        widths = [(0, 0), (0, count * size - seq)] + [(0, 0)] * (v.ndim - 2)
        v = jnp.pad(v, widths).reshape(v.shape[0], count, size, *v.shape[2:])
        return jnp.moveaxis(v, (1, 2), (0, 2 + apart))

    tokens = _Tokens(*map(chunks, tokens, _APART))
    h, y = jax.lax.scan(jax.checkpoint(_chunk), h, tokens)
    y = jnp.moveaxis(y, (0, 4), (1, 2))
    return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :seq], h


def _chunk(h, tokens):
    """One chunk of every row.

    Letters of the products: `r` row, `g` group, `k` head of the group, `i` and `j`
    tokens, `p` channel of the head, `n` state.
    """
    x, log_decay, coefficient, B, C, reset = tokens
    x, B, C = (v.astype(h.dtype) for v in (x, B, C))
    if coefficient is not None:
        x = x * coefficient.astype(h.dtype)[..., None]
    # What underflows anyway must not take the digits of the sums behind it.
    log_decay = jnp.maximum(log_decay, _least_decay(h.dtype))
    reaches, enters, leaves = _masks(reset, x.shape[-2])
    spoiled = None
    if reset is not None:
        spoiled = _spoiled(h, x, log_decay, B, C)
        h, x, log_decay, B, C = map(_without_them, (h, x, log_decay, B, C))
    total = jnp.cumsum(log_decay, axis=-1)

    weights = _exp(total[..., :, None] - total[..., None, :], reaches)
    scores = jnp.einsum("rgin,rgjn->rgij", C, B)
    y = jnp.einsum("rgkij,rgkjp->rgkip", weights * scores[:, :, None], x)
    carried = jnp.einsum("rgin,rgkpn->rgkip", C, h)
    y = y + _exp(total, enters)[..., None] * carried

    last = total[..., -1:]
    x = _exp(last - total, leaves)[..., None] * x
    decay = _exp(last, None if enters is None else enters[..., -1:])
    h = decay[..., None] * h + jnp.einsum("rgkjp,rgjn->rgkpn", x, B)
    if spoiled is not None:
        at_token, at_end = spoiled.spread(reaches, enters, leaves)
        y = y + at_token[..., None].astype(y.dtype)
        h = h + at_end[..., None, None].astype(h.dtype)
    return h, y


class _Spoiled(NamedTuple):
    """Where something is not finite: in the state, in what a token adds, in its `C`.

    A product over a chunk would carry it into documents that it has no part in, since
    infinity times a weight of zero is no number. So it is left out of the products, and
    then no number is put where it had reached.
    """

    state: Bool[Array, "row group head"]
    token: Bool[Array, "row group head seq"]
    readout: Bool[Array, "row group head seq"]

    def spread(self, reaches, enters, leaves) -> tuple[Array, Array]:
        """NaN at the outputs that they reach and in the state that they do, or zero."""
        at_token = jnp.any(reaches & self.token[..., None, :], axis=-1)
        at_token = at_token | (enters & self.state[..., None]) | self.readout
        at_end = jnp.any(leaves & self.token, axis=-1)
        at_end = at_end | (enters[..., -1] & self.state)
        return jnp.where(at_token, jnp.nan, 0.0), jnp.where(at_end, jnp.nan, 0.0)


def _spoiled(h, x, log_decay, B, C) -> _Spoiled:
    def among(v, *axes):
        return ~jnp.all(jnp.isfinite(v), axis=axes)

    token = among(x, -1) | ~jnp.isfinite(log_decay) | among(B, -1)[:, :, None]
    readout = jnp.broadcast_to(among(C, -1)[:, :, None], token.shape)
    return _Spoiled(among(h, -1, -2), token, readout)


def _without_them(v):
    return jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))


def _least_decay(dtype) -> float:
    """Its exponential is zero."""
    return math.log(float(jnp.finfo(dtype).smallest_subnormal)) - 1


def _masks(reset, size):
    """Which tokens reach which, which ones the entering state reaches, and which reach
    the leaving one, in the axes of the decays; `None` is all of them."""
    causal = jnp.tri(size, dtype=bool)[None, None, None]
    if reset is None:
        return causal, None, None
    document = jnp.cumsum(reset, axis=-1, dtype=jnp.int32)[:, None, None]
    same = document[..., :, None] == document[..., None, :]
    return same & causal, document == 0, document == document[..., -1:]


def _exp(exponent, mask):
    return jnp.exp(exponent if mask is None else jnp.where(mask, exponent, -jnp.inf))
