"""The largest few of every group of neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..internal import check_size
from ._weight import straight_through


@dataclasses.dataclass(frozen=True)
class NM:
    r"""At most `n` values other than zero in every `m` neighbours along the input.

    The `n` of largest size stay, of equal ones the first. Mishra et al., *Accelerating
    Sparse Deep Neural Networks*, arXiv 2104.08378 (2:4). Under
    `transforms.prepare_qat` the choice is made anew from the whole weight at every
    step and derivatives reach every value, as in Zhou et al., *Learning N:M
    Fine-grained Structured Sparse Neural Networks From Scratch*, arXiv 2102.04010; the
    decay that the paper adds is `transforms.sr_ste`.

    **Arguments:**

    - `n`: values that stay in a group.
    - `m`: neighbours in a group; must divide the width of the input.

    **Raises:**

    `ValueError` for numbers that are not positive, or `n` greater than `m`.

    !!! example

        ```python
        NM(2, 4)
        ```
    """

    n: int = 2
    m: int = 4

    def __post_init__(self):
        check_size("n", self.n)
        check_size("m", self.m)
        if self.n > self.m:
            raise ValueError(
                f"`n` must not be greater than `m`: {self.n} of {self.m} neighbours "
                "cannot stay. Are they swapped?"
            )
        if self.m > 256:
            raise ValueError(f"`m` must be at most 256, got {self.m}.")

    @property
    def learned_step(self) -> bool:
        """There is no step."""
        return False

    @property
    def index_bits(self) -> int:
        """Of a place in a group."""
        return max(1, (self.m - 1).bit_length())

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def nm_mask(weight: Float[Array, "*stack in"], spec: NM) -> Bool[Array, "*stack in"]:
    """Which values stay.

    **Arguments:**

    - `weight`: groups lie along the last axis, `(*stack, in)`.
    - `spec`: how many of how many.

    **Returns:**

    True for `n` in every `m`, `(*stack, in)`.

    **Raises:**

    `ValueError` if `m` does not divide the last axis.

    !!! example

        ```python
        nm_mask(jnp.array([[1.0, -3.0, 2.0, 0.0]]), NM(2, 4))  # only -3 and 2
        ```
    """
    places = nm_places(weight, spec)
    kept = jax.nn.one_hot(places, spec.m, dtype=jnp.bool_).any(axis=-2)
    return kept.reshape(weight.shape)


def nm_places(weight: Float[Array, "*stack in"], spec: NM) -> Array:
    """Where in its group each value that stays lies, in order, `(..., groups, n)`."""
    if weight.shape[-1] % spec.m:
        raise ValueError(
            f"groups of {spec.m} do not fit a weight with {weight.shape[-1]} inputs, "
            f"shape {weight.shape}. Choose an `m` that divides them."
        )
    groups = weight.reshape(*weight.shape[:-1], -1, spec.m)
    # The first of equal ones, as `top_k` promises.
    return jnp.sort(jax.lax.top_k(jnp.abs(groups), spec.n)[1], axis=-1)


def fake_nm(weight: Float[Array, "*stack in"], spec: NM) -> Float[Array, "*stack in"]:
    """The weight with zeros, with derivatives as if there were none."""
    mask = nm_mask(jax.lax.stop_gradient(weight), spec)
    return straight_through(jnp.where(mask, weight, jnp.zeros_like(weight)), weight)
