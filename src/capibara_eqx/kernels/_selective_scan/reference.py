import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...internal import accumulator_dtype
from .._carry import start_of


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
    """The definition of `kernels.selective_scan`: one step a token, written plainly."""
    if u.ndim > 2:
        # One row at a time, so that this form has no batch axis to get wrong.
        rows = (u, delta, B, C, z, initial_state, reset)
        return jax.vmap(
            lambda u, delta, B, C, z, h, reset: selective_scan(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, h, reset
            )
        )(*rows)
    dtype = accumulator_dtype(u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype)
    if initial_state is not None:
        dtype = accumulator_dtype(dtype, initial_state.dtype)
    x, dt, A, B, C = (v.astype(dtype) for v in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.astype(dtype)[None]
    if delta_softplus:
        dt = jax.nn.softplus(dt)

    def step(h, token):
        x, dt, B, C, reset = token
        if reset is not None:
            h = jnp.where(reset, jnp.zeros_like(h), h)
        h = jnp.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
        return h, h @ C

    entering = (x[0, :, None], dt[0, :, None], A, B[:1])
    start = None if reset is None else reset[:1, None]
    h = start_of(initial_state, A.shape, dtype, *entering, start)
    h, y = jax.lax.scan(step, h, (x, dt, B, C, reset))
    if D is not None:
        y = y + D.astype(dtype)[None] * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), h
