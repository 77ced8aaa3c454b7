"""The selective scan as one would write it at first: what the library is compared with.

All take `u, delta (B, L, D)`, `A (D, N)`, `B, C (B, L, N)`, `D (D,)` and return `y`.
"""

import jax
import jax.numpy as jnp


def plain_scan(u, delta, A, B, C, D):
    """`jax.lax.scan` over tokens, channels on the last axis, the batch kept as it is.

    Nothing is recomputed, so reverse mode stores the states of all tokens.
    """
    decay = A.T[None]

    def step(h, token):
        x, dt, B, C = token
        h = jnp.exp(dt[:, None, :] * decay) * h + (dt * x)[:, None, :] * B[:, :, None]
        return h, jnp.sum(h * C[:, :, None], axis=1)

    h = jnp.zeros((u.shape[0], A.shape[1], A.shape[0]), u.dtype)
    return _over_tokens(step, h, u, delta, B, C) + D[None, None] * u


def plain_scan_rows(u, delta, A, B, C, D):
    """`plain_scan`, with the batch axis dropped where there is one row."""
    if u.shape[0] > 1:
        return plain_scan(u, delta, A, B, C, D)
    return channels_last(u[0], delta[0], A, B[0], C[0], D)[None]


def channels_last(u, delta, A, B, C, D):
    """One row, `u (L, D)`: the state is `(d_state, d_inner)`."""
    decay = A.T

    def step(h, token):
        x, dt, B, C = token
        h = jnp.exp(dt[None, :] * decay) * h + (dt * x)[None, :] * B[:, None]
        return h, jnp.sum(h * C[:, None], axis=0)

    h = jnp.zeros((A.shape[1], A.shape[0]), u.dtype)
    return jax.lax.scan(step, h, (u, delta, B, C))[1] + D[None] * u


def channels_first(u, delta, A, B, C, D):
    """One row, `u (L, D)`: the state is `(d_inner, d_state)`."""

    def step(h, token):
        x, dt, B, C = token
        h = jnp.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
        return h, jnp.sum(h * C[None, :], axis=1)

    h = jnp.zeros(A.shape, u.dtype)
    return jax.lax.scan(step, h, (u, delta, B, C))[1] + D[None] * u


def associative_scan(u, delta, A, B, C, D):
    """`jax.lax.associative_scan` over the states of all tokens."""
    decay = jnp.exp(delta[:, :, None, :] * A.T[None, None])
    entering = (delta * u)[:, :, None, :] * B[..., None]

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    h = jax.lax.associative_scan(combine, (decay, entering), axis=1)[1]
    return jnp.einsum("blnd,bln->bld", h, C) + D[None, None] * u


def _over_tokens(step, h, *sequences):
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in sequences)
    return jnp.moveaxis(jax.lax.scan(step, h, tokens)[1], 0, 1)
