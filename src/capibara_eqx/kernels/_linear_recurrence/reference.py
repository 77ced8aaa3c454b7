import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from ...internal import accumulator_dtype, promote_dtypes


def linear_recurrence(
    a: Inexact[Array, "*batch seq d"],
    x: Inexact[Array, "*batch seq d"],
    initial_state: Inexact[Array, "*batch d"] | None,
    reset: Bool[Array, "*batch seq"] | None,
    reverse: bool,
) -> tuple[Inexact[Array, "*batch seq d"], Inexact[Array, "*batch d"]]:
    """The definition of `kernels.linear_recurrence`: one step a token."""
    dtype = accumulator_dtype(a.dtype, x.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((*x.shape[:-2], x.shape[-1]), dtype)
    dtype = accumulator_dtype(dtype, initial_state.dtype)
    if reset is None:
        reset = jnp.zeros(x.shape[:-1], bool)

    def step(h, token):
        a, x, reset = token
        h = jnp.where(reset[..., None], jnp.zeros_like(h), h)
        h = a * h + x
        return h, h

    time_first = (
        jnp.moveaxis(a.astype(dtype), -2, 0),
        jnp.moveaxis(x.astype(dtype), -2, 0),
        jnp.moveaxis(reset, -1, 0),
    )
    last, h = jax.lax.scan(
        step, initial_state.astype(dtype), time_first, reverse=reverse
    )
    h = jnp.moveaxis(h, 0, -2).astype(promote_dtypes(a.dtype, x.dtype))
    return h, last
