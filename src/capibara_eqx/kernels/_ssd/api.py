from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...internal import check_batch, check_kind, check_shape, check_size
from .._dispatch import dispatch
from . import fused, reference, xla


BACKENDS = {
    **{name: fused.implementation(name) for name in fused.NAMES},
    "xla": xla.ssd,
    "reference": reference.ssd,
}
_DEFAULT = {"fused": fused.implementation(None), "xla": xla.ssd}


def ssd(
    x: Float[Array, "*batch seq n_heads head_dim"],
    log_decay: Float[Array, "*batch seq n_heads"],
    B: Float[Array, "*batch seq n_groups d_state"],
    C: Float[Array, "*batch seq n_groups d_state"],
    *,
    coefficient: Float[Array, "*batch seq n_heads"] | None = None,
    initial_state: Float[Array, "*batch n_heads head_dim d_state"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    chunk_size: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[
    Float[Array, "*batch seq n_heads head_dim"],
    Float[Array, "*batch n_heads head_dim d_state"],
]:
    r"""The state space dual of Mamba-2: a scan with one decay a head, by products.

    For every head, with $g$ its group and $h_0$ the initial state, a matrix of
    `(head_dim, d_state)`:

    $$h_t = e^{a_t} h_{t-1} + c_t\, x_t B_{t,g}^\top, \qquad y_t = h_t C_{t,g}$$

    Mamba-2 has $a = \Delta A$ and $c = \Delta$. The coefficient is free, so that other
    rules are sums of calls: Mamba-3's trapezoid $h_t = e^{a_t} h_{t-1} + \beta_t
    x_{t-1} B_{t-1}^\top + \gamma_t x_t B_t^\top$ is two. In XLA the recurrence within a
    chunk of tokens is a masked product, as attention is, and a state passes from chunk
    to chunk. Dao and Gu, *Transformers are SSMs*, arXiv 2405.21060.

    Differentiable any number of times, forward and reverse, in every array argument,
    through `y` and `final_state`; works under `jit`, `vmap`, `checkpoint` and inside
    `shard_map` over mesh axes of type Auto or Explicit.

    **Arguments:**

    - `x`: input, `(*batch, seq, n_heads, head_dim)`, any number of batch axes.
    - `log_decay`: $a$, zero or negative for stability, `(*batch, seq, n_heads)`; minus
        infinity forgets. Sums of up to `chunk_size` of them are subtracted from each
        other, so that weights have the relative error of the largest such sum, in its
        dtype; one whose exponential is zero counts as -104 in float32, -745 in float64.
    - `B`, `C`: input and output maps of each token, `(*batch, seq, n_groups, d_state)`.
        `n_groups` divides `n_heads`; neighbouring heads share a group.
    - `coefficient`: $c$, `(*batch, seq, n_heads)`; ones if not given.
    - `initial_state`: state before the first token, `(*batch, n_heads, head_dim,
        d_state)`; zeros if not given.
    - `reset`: where the state is zeroed before the token is read, `(*batch, seq)`.
    - `chunk_size`: tokens that XLA multiplies together, and after which the C++ kernel
        keeps a state for the gradients; it changes speed and memory, not the result. By
        default what measured fastest.
    - `implementation`: `"cpu"`, `"xla"`, `"reference"`, or a sequence of names of which
        the first that can is used. By default the C++ kernel on a CPU, which runs the
        recurrence with the state in registers, and XLA's products elsewhere.

    **Returns:**

    `(y, final_state)`: `y` with the shape and dtype of `x`, and the state after the
    last token in float32 or wider.

    **Raises:**

    `ValueError` naming the argument whose shape or dtype does not fit, or an unknown
    implementation.

    !!! example

        ```python
        x = jnp.ones((2, 100, 4, 16))                  # 4 heads of 16 channels
        dt, A = jnp.full((2, 100, 4), 0.1), -jnp.arange(1.0, 5.0)
        B, C = jnp.ones((2, 2, 100, 1, 8))             # 1 group, 8 states
        y, state = ssd(x, dt * A, B, C, coefficient=dt)
        y2, state = ssd(x, dt * A, B, C, coefficient=dt, initial_state=state)
        ```
    """
    name = "ssd"
    check_batch(name, "x", x, ("seq", "n_heads", "head_dim"))
    *batch, seq, n_heads, head_dim = x.shape
    if B.ndim < 2 or B.shape[-2] == 0 or n_heads % B.shape[-2]:
        raise ValueError(
            f"{name}: `B` must have shape (*batch, seq, n_groups, d_state), where "
            f"n_groups divides the {n_heads} heads of `x`; got {B.shape}."
        )
    n_groups, d_state = B.shape[-2:]
    for argument, value in (("B", B), ("C", C)):
        expected = (*batch, seq, n_groups, d_state)
        meaning = "(*batch, seq, n_groups, d_state)"
        check_shape(name, argument, value, expected, meaning)
    heads = (*batch, seq, n_heads)
    check_shape(name, "log_decay", log_decay, heads, "(*batch, seq, n_heads)")
    check_shape(name, "coefficient", coefficient, heads, "(*batch, seq, n_heads)")
    expected = (*batch, n_heads, head_dim, d_state)
    meaning = "(*batch, n_heads, head_dim, d_state)"
    check_shape(name, "initial_state", initial_state, expected, meaning)
    check_shape(name, "reset", reset, (*batch, seq), "(*batch, seq)", kind=jnp.bool_)
    floats = {"x": x, "log_decay": log_decay, "B": B, "C": C}
    floats |= {"coefficient": coefficient, "initial_state": initial_state}
    check_kind(name, floats, jnp.floating)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)
    operands = (x, log_decay, B, C, coefficient, initial_state, reset)
    operands = (*operands, chunk_size)
    return dispatch(name, BACKENDS, implementation, *operands, default=_DEFAULT)
