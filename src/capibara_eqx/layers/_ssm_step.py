import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..internal import accumulator_dtype


@jax.named_scope("capibara_eqx.layers.ssm_step")
def ssm_step(
    carry: tuple[Float[Array, "*batch state"], Float[Array, "*batch d_out"]],
    x_t: Float[Array, "*batch d_in"],
    A: Float[Array, "state state"],
    B: Float[Array, "state d_in"],
    C: Float[Array, "d_out state"],
) -> tuple[
    tuple[Float[Array, "*batch state"], Float[Array, "*batch d_out"]],
    Float[Array, "*batch d_out"],
]:
    r"""One step of a discrete linear state space, for `jax.lax.scan`.

    $$h_t = A h_{t-1} + B x_t, \qquad y_t = C h_t$$

    The matrices are discrete: `LinearSSM.discretized` gives those of a layer. What a
    system does next follows from its state alone; the previous output is carried for
    loops that want it, and plays no part.

    **Arguments:**

    - `carry`: `(h, y_prev)`, the state `(*batch, state)` and the previous output
        `(*batch, d_out)`, zeros before the first step.
    - `x_t`: one input, `(*batch, d_in)`.
    - `A`, `B`, `C`: `(state, state)`, `(state, d_in)` and `(d_out, state)`.

    **Returns:**

    `((h, y), y)`, in the dtypes of `h` and `y_prev`; it computes in float32 or wider.

    **Raises:**

    `ValueError` naming the argument whose shape or dtype does not fit.

    !!! example

        ```python
        A, B, C = 0.9 * jnp.eye(2), jnp.ones((2, 64)), jnp.ones((3, 2))
        carry = (jnp.zeros(2), jnp.zeros(3))
        step = lambda carry, x_t: ssm_step(carry, x_t, A, B, C)
        carry, y = jax.lax.scan(step, carry, x[0])     # y is (seq, 3)
        ```
    """
    h, y_prev = carry
    _check_shapes(h, y_prev, x_t, A, B, C)
    wide = accumulator_dtype(h.dtype, x_t.dtype, A.dtype, B.dtype, C.dtype)
    A, B, C = (matrix.astype(wide).T for matrix in (A, B, C))
    # Accelerators round the operands of a product; the state would collect that.
    decayed = jnp.matmul(h.astype(wide), A, precision=jax.lax.Precision.HIGHEST)
    h_t = decayed + x_t.astype(wide) @ B
    y = (h_t @ C).astype(y_prev.dtype)
    return (h_t.astype(h.dtype), y), y


def _check_shapes(h, y_prev, x_t, A, B, C):
    batch, state = h.shape[:-1], h.shape[-1]
    d_in, d_out = x_t.shape[-1], y_prev.shape[-1]
    expected = {
        "x_t": (x_t.shape, (*batch, d_in), "(*batch, d_in)"),
        "carry[1]": (y_prev.shape, (*batch, d_out), "(*batch, d_out)"),
        "A": (A.shape, (state, state), "(state, state)"),
        "B": (B.shape, (state, d_in), "(state, d_in)"),
        "C": (C.shape, (d_out, state), "(d_out, state)"),
    }
    for name, (got, want, meaning) in expected.items():
        if got != want:
            raise ValueError(
                f"ssm_step: `{name}` must have shape {meaning}, here {want} for the "
                f"state {h.shape} in `carry[0]`; got {got}."
            )
