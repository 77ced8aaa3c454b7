"""Recursive least squares, read at every token, without a matrix a token.

The matrices are sums of outer products that decay, so that each times a vector of its
token is `kernels.ssd`: the carried sum times the vector, and attention within a chunk.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..internal import accumulator_dtype
from ..kernels import linear_recurrence, ssd
from ._conjugate_gradient import conjugate_gradient


class MesaState(eqx.Module):
    r"""The sums $H$ of $k k^\top$ and $G$ of $v k^\top$."""

    H: Float[Array, "*batch n_heads d_k d_k"]
    G: Float[Array, "*batch n_heads d_v d_k"]


def mesa(
    q: Float[Array, "*batch seq n_heads d_k"],
    k: Float[Array, "*batch seq n_heads d_k"],
    v: Float[Array, "*batch seq n_heads d_v"],
    log_decay: Float[Array, "*batch seq n_heads"],
    beta: Float[Array, "*batch seq n_heads"],
    ridge: Float[Array, "n_heads d_k"],
    state: MesaState,
    *,
    solver: str = "cg",
    cg_steps: int = 30,
    reset: Bool[Array, "*batch seq"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "*batch seq n_heads d_v"], MesaState]:
    r"""What the best linear map of the keys so far to their values says to a query.

    $$o_t = G_t (H_t + \Lambda)^{-1} q_t = \Phi_t q_t, \qquad \Phi_t = \arg\min_\Phi
    \sum_{s \le t} w_{ts} |\Phi k_s - v_s|^2 + \mathrm{tr}(\Phi \Lambda \Phi^\top),
    \qquad w_{ts} = \beta_s \prod_{r = s + 1}^{t} \gamma_r$$

    **Arguments:**

    - `q`, `k`, `v`: of each token, in float32 or wider.
    - `log_decay`, `beta`: $\log \gamma$ and $\beta$.
    - `ridge`: the diagonal of $\Lambda$, positive.
    - `state`: $H$ and $G$ before the first token.
    - `solver`: `"cg"`, conjugate gradients of `cg_steps` steps, or `"cholesky"`, which
        is exact and makes $H_t$ for every token.
    - `reset`: where the sums begin anew.
    - `options`: of `kernels.ssd`.

    **Returns:**

    $o$, and the sums after the last token.
    """

    given = (q, k, v, log_decay, beta, ridge)
    sums = (state.H, state.G)
    dtype = accumulator_dtype(*(x.dtype for x in (*given, *sums)))
    q, k, v, log_decay, beta, ridge = (x.astype(dtype) for x in given)
    state = MesaState(*(x.astype(dtype) for x in sums))

    def summed(values, readers, before):
        """Sums of `values` times keys, and each times its token's reader."""
        options_here = {"reset": reset, "initial_state": before, **options}
        return ssd(values, log_decay, k, readers, coefficient=beta, **options_here)

    H = summed(k, q, state.H)[1]

    def product(p):
        if p.shape[-3] == 1:  # One token, whose matrix is at hand.
            found = jnp.einsum("...hij,...thj->...thi", H, p)
        else:
            found = summed(k, p, state.H)[0]
        return found + jnp.broadcast_to(ridge, p.shape) * p

    if solver == "cg":
        solved = conjugate_gradient(product, q, cg_steps)
    else:
        matrices = _matrices(k, log_decay, beta, state.H, reset)
        unit = jnp.eye(q.shape[-1], dtype=matrices.dtype)
        diagonal = jnp.broadcast_to(ridge[..., None] * unit[None], matrices.shape)
        root = jnp.linalg.cholesky(matrices + diagonal)
        solved = jax.scipy.linalg.cho_solve((root, True), q[..., None])[..., 0]
    o, G = summed(v, solved, state.G)
    return o, MesaState(H, G)


def _matrices(k, log_decay, beta, H, reset) -> Float[Array, "*batch seq n d_k d_k"]:
    """The sums of products of keys after every token."""
    products = (beta[..., None] * k)[..., None] * k[..., None, :]
    decays = jnp.broadcast_to(jnp.exp(log_decay)[..., None, None], products.shape)
    *axes, n_heads, width, _ = products.shape
    size = n_heads * width * width
    sums, _ = linear_recurrence(
        decays.reshape(*axes, size),
        products.reshape(*axes, size),
        initial_state=H.reshape(*axes[:-1], size),
        reset=reset,
    )
    return sums.reshape(products.shape)
