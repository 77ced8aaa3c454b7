import jax.numpy as jnp
from jax.scipy.linalg import expm
from jaxtyping import Array, Float


def discretize_dense(
    A: Float[Array, "state state"], dt: Float[Array, ""], method: str
) -> tuple[Float[Array, "state state"], Float[Array, "state state"]]:
    r"""A system $h' = A h + B u$ with a full matrix in steps of `dt`.

    $$\bar A = e^{\Delta A}, \quad \bar B = \int_0^\Delta e^{s A} ds\, B \qquad
    \text{or} \qquad \bar A = (1 - \tfrac{\Delta}{2} A)^{-1} (1 + \tfrac{\Delta}{2} A),
    \quad \bar B = (1 - \tfrac{\Delta}{2} A)^{-1} \Delta B$$

    by a zero-order hold or by the bilinear rule. The integral is a block of the
    exponential of a matrix twice as large, so that `A` need not have an inverse (Van
    Loan, *Computing Integrals Involving the Matrix Exponential*, 1978).

    **Arguments:**

    - `A`: `(state, state)`, float32 or wider.
    - `dt`: the step size.
    - `method`: `"zoh"` or `"bilinear"`.

    **Returns:**

    `(A_bar, factor)`, where $\bar B$ is `factor` times $B$. The exponential is squared
    up from a small one and each squaring doubles what rounding left: in units of the
    last place it is off by about the largest column sum of $|\Delta A|$.
    """
    size = A.shape[0]
    one = jnp.eye(size, dtype=A.dtype)
    if method == "bilinear":
        half = dt / 2 * A
        sides = jnp.concatenate([one + half, dt * one], axis=1)
        solved = jnp.linalg.solve(one - half, sides)
        return solved[:, :size], solved[:, size:]
    above = dt * jnp.concatenate([A, one], axis=1)
    whole = expm(jnp.concatenate([above, jnp.zeros_like(above)], axis=0))
    return whole[:size, :size], whole[:size, size:]
