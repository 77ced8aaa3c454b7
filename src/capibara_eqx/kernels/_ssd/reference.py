import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...internal import accumulator_dtype
from .._carry import start_of


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
    """The definition of `kernels.ssd`: one step a token; there are no chunks."""
    if x.ndim > 3:
        # One row at a time, so that this form has no batch axis to get wrong.
        rows = (x, log_decay, B, C, coefficient, initial_state, reset)
        return jax.vmap(
            lambda x, log_decay, B, C, coefficient, h, reset: ssd(
                x, log_decay, B, C, coefficient, h, reset, chunk_size
            )
        )(*rows)
    dtype = accumulator_dtype(x.dtype, log_decay.dtype, B.dtype, C.dtype)
    for optional in (coefficient, initial_state):
        if optional is not None:
            dtype = accumulator_dtype(dtype, optional.dtype)
    n_heads, head_dim = x.shape[1:]
    each = n_heads // B.shape[1]
    B, C = (jnp.repeat(v.astype(dtype), each, axis=1) for v in (B, C))
    inputs, log_decay = x.astype(dtype), log_decay.astype(dtype)
    if coefficient is not None:
        inputs = inputs * coefficient.astype(dtype)[..., None]

    def step(h, token):
        x, log_decay, B, C, reset = token
        if reset is not None:
            h = jnp.where(reset, jnp.zeros_like(h), h)
        h = jnp.exp(log_decay)[:, None, None] * h + x[..., None] * B[:, None]
        return h, jnp.sum(h * C[:, None], -1)

    shape = (n_heads, head_dim, B.shape[-1])
    start = None if reset is None else reset[:1, None, None]
    entering = (inputs[0, ..., None], log_decay[0, :, None, None], B[0, :, None])
    h = start_of(initial_state, shape, dtype, *entering, start)
    h, y = jax.lax.scan(step, h, (inputs, log_decay, B, C, reset))
    return y.astype(x.dtype), h
