import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from ...internal import accumulator_dtype, promote_dtypes
from .._carry import start_of


def linear_recurrence(
    a: Inexact[Array, "*batch seq d"],
    x: Inexact[Array, "*batch seq d"],
    initial_state: Inexact[Array, "*batch d"] | None,
    reset: Bool[Array, "*batch seq"] | None,
    reverse: bool,
) -> tuple[Inexact[Array, "*batch seq d"], Inexact[Array, "*batch d"]]:
    """`kernels.linear_recurrence` as one scan over one long vector of channels.

    All states are asked for, so memory is linear in `seq` whatever is done, and a
    step costs two reads, a multiply-add and a write: unrolling, chunking with a
    correction and the associative form all measured slower on CPU.
    """
    *batch, seq, d = x.shape
    dtype = accumulator_dtype(a.dtype, x.dtype)
    if initial_state is not None:
        dtype = accumulator_dtype(dtype, initial_state.dtype)
    entering = (a[..., 0, :], x[..., 0, :], None if reset is None else reset[..., :1])
    start = start_of(initial_state, (*batch, d), dtype, *entering)

    def vectors(x):
        # Rows and channels in one axis: a batch axis of one element would keep XLA's
        # CPU backend from vectorising the step.
        return jnp.moveaxis(x, -2, 0).reshape(seq, -1)

    def step(h, token):
        a, x, *reset = token
        if reset:
            # Replaced, not multiplied by zero: the state may be infinite.
            h = jnp.where(reset[0], jnp.zeros_like(h), h)
        h = a * h + x
        return h, h

    tokens = (vectors(a.astype(dtype)), vectors(x.astype(dtype)))
    if reset is not None:
        tokens = (*tokens, vectors(jnp.broadcast_to(reset[..., None], x.shape)))
    last, h = jax.lax.scan(step, start.reshape(-1), tokens, reverse=reverse)
    h = jnp.moveaxis(h.reshape(seq, *batch, d), 0, -2)
    return h.astype(promote_dtypes(a.dtype, x.dtype)), last.reshape(*batch, d)
