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
    """The definition of `kernels.linear_recurrence`: one step a token."""
    dtype = accumulator_dtype(a.dtype, x.dtype)
    if initial_state is not None:
        dtype = accumulator_dtype(dtype, initial_state.dtype)
    entering = (a[..., 0, :], x[..., 0, :], None if reset is None else reset[..., :1])
    start = start_of(initial_state, (*x.shape[:-2], x.shape[-1]), dtype, *entering)

    def step(h, token):
        a, x, reset = token
        if reset is not None:
            h = jnp.where(reset[..., None], jnp.zeros_like(h), h)
        h = a * h + x
        return h, h

    time_first = (
        jnp.moveaxis(a.astype(dtype), -2, 0),
        jnp.moveaxis(x.astype(dtype), -2, 0),
        None if reset is None else jnp.moveaxis(reset, -1, 0),
    )
    last, h = jax.lax.scan(step, start, time_first, reverse=reverse)
    h = jnp.moveaxis(h, 0, -2).astype(promote_dtypes(a.dtype, x.dtype))
    return h, last
