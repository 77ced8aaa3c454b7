import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from ..internal import check_choice


DISCRETIZATIONS = ("zoh", "bilinear")

# Below this |z| the series of (e^z - 1) / z, above it the quotient: so neither it nor
# its first derivatives lose digits. Its 16 terms are exact to 2^-53 there.
_SMALL = 0.5
_TERMS = 16


def check_discretization(method: str) -> None:
    """Raise `ValueError` unless `method` is a known discretisation."""
    check_choice("discretization", method, DISCRETIZATIONS)


def discretize(
    A: Inexact[Array, "*shape"], dt: Float[Array, "*shape"], method: str
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    r"""A diagonal system $h' = A h + B u$ in steps of `dt`.

    $$\bar A = e^{\Delta A}, \quad \bar B = \frac{e^{\Delta A} - 1}{A} B \qquad
    \text{or} \qquad \bar A = \frac{1 + \Delta A / 2}{1 - \Delta A / 2}, \quad
    \bar B = \frac{\Delta}{1 - \Delta A / 2} B$$

    by a zero-order hold, exact for an input that is constant during a step, or by the
    bilinear rule. Both are smooth where $A = 0$.

    **Arguments:**

    - `A`: the diagonal, real or complex.
    - `dt`: step sizes.
    - `method`: `"zoh"` or `"bilinear"`.

    **Returns:**

    `(A_bar, factor)`, where $\bar B$ is `factor` times $B$.
    """
    z = A * dt.astype(A.dtype)
    if method == "bilinear":
        return (1 + z / 2) / (1 - z / 2), dt.astype(A.dtype) / (1 - z / 2)
    series = jnp.ones_like(z)
    for k in range(_TERMS, 1, -1):
        series = 1 + z / k * series
    A_bar = jnp.exp(z)
    small = jnp.abs(z) < _SMALL
    quotient = (A_bar - 1) / jnp.where(small, jnp.ones_like(z), z)
    return A_bar, dt.astype(A.dtype) * jnp.where(small, series, quotient)
