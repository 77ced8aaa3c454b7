import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def ridge_head(
    x: Float[Array, "n d"], y: Float[Array, "n k"], log_lambda: Float[Array, ""]
) -> Float[Array, "d k"]:
    r"""$\arg\min_W |XW - Y|^2 + \lambda |W|^2$, by a system of the smaller size."""
    count, width = x.shape
    if count < width:
        system = x @ x.T + jnp.exp(log_lambda) * jnp.eye(count, dtype=x.dtype)
        return x.T @ jax.scipy.linalg.solve(system, y, assume_a="pos")
    system = x.T @ x + jnp.exp(log_lambda) * jnp.eye(width, dtype=x.dtype)
    return jax.scipy.linalg.solve(system, x.T @ y, assume_a="pos")
