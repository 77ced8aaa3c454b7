import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from ..internal import check_choice


DISCRETIZATIONS = ("zoh", "bilinear")


def check_discretization(name: str) -> None:
    """Raise `ValueError` unless `name` is a known discretisation."""
    check_choice("discretization", name, DISCRETIZATIONS)


def discretize(
    A: Complex[Array, "*shape"], dt: Float[Array, "*shape"], method: str
) -> tuple[Complex[Array, "*shape"], Complex[Array, "*shape"]]:
    r"""The diagonal system $h' = A h + x$ as steps $h_t = \bar A h_{t-1} + \bar b x_t$.

    `"zoh"` holds the input during a step: $\bar A = e^{\Delta A}$,
    $\bar b = (\bar A - 1) / A$. `"bilinear"` is the trapezoidal rule:
    $\bar A = (1 + \Delta A / 2) / (1 - \Delta A / 2)$,
    $\bar b = \Delta / (1 - \Delta A / 2)$. Both keep $|\bar A| < 1$ where the real part
    of $A$ is negative.
    """
    dt = dt.astype(A.dtype)
    step = dt * A
    if method == "zoh":
        # expm1: for small steps exp - 1 would cancel.
        return jnp.exp(step), jnp.expm1(step) / A
    return (1 + step / 2) / (1 - step / 2), dt / (1 - step / 2)
