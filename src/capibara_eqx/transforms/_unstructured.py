"""Which values of a weight may stay: a share of all, or a few of every group."""

import dataclasses
import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num, Shaped

from ..arrays import NM, AbstractWeight
from ..internal import check_range
from ._places import Place


@dataclasses.dataclass(frozen=True)
class Unstructured:
    r"""A share of the values of a matrix stays, wherever they lie, for `sparsify`.

    Of $d_{in} d_{out}$ values $\mathrm{round}(\rho\, d_{in} d_{out})$ stay, one at
    least. The array stays an array, with zeros: it is no smaller in memory.

    **Arguments:**

    - `density`: $\rho$, the share that stays, in (0, 1].

    **Raises:**

    `ValueError` for a density outside of that.

    !!! example

        ```python
        Rule(r".*weight", Unstructured(0.1))
        ```
    """

    density: float

    def __post_init__(self):
        hint = "It is the share that stays, one minus the sparsity."
        check_range("density", self.density, above=0, most=1, hint=hint)

    def __str__(self) -> str:
        return f"density {self.density:g}"


@dataclasses.dataclass(frozen=True)
class Groups:
    """How the values of a weight compete: `count` stay of every `width`.

    - `shape`: of the weight.
    - `matrix`: axes of one matrix, the last ones; those in front stack matrices.
    """

    shape: tuple[int, ...]
    matrix: int
    width: int
    count: int

    @classmethod
    def of(cls, function: str, place: Place, spec: Unstructured | NM) -> "Groups":
        """Those of a weight; of a convolution a row holds the taps of a channel."""
        _check(function, place, spec)
        matrix = matrix_axes(place)
        shape = place.value.shape
        if isinstance(spec, Unstructured):
            width = math.prod(shape[-matrix:])
            return cls(shape, matrix, width, max(1, round(spec.density * width)))
        inputs = math.prod(shape[1 - matrix :])
        if inputs % spec.m:
            raise ValueError(
                f"{function}: groups of {spec.m} do not fit the weight {place.path!r} "
                f"with {inputs} inputs, shape {shape}. Choose an `m` that divides them."
            )
        return cls(shape, matrix, spec.m, spec.n)

    @property
    def per_matrix(self) -> int:
        """Groups in one matrix."""
        return math.prod(self.shape[-self.matrix :]) // self.width

    def split(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*stack groups width"]:
        stack = x.shape[: x.ndim - self.matrix]
        return x.reshape(*stack, self.per_matrix, self.width)

    def join(self, x: Shaped[Array, "*stack groups width"]) -> Shaped[Array, "*shape"]:
        return x.reshape(self.shape)

    def largest(
        self, score: Num[Array, "*shape"], count: int | Int[Array, ""] | None = None
    ) -> Bool[Array, "*shape"]:
        """The `count` highest of every group, as many as stay if not given."""
        count = self.count if count is None else count
        return self.join(highest(self.split(score), count))


def highest(
    score: Num[Array, "*rows width"],
    count: int | Int[Array, ""] | Int[Array, "*rows 1"],
) -> Bool[Array, "*rows width"]:
    """Those of the highest scores along the last axis; of equal ones the first."""
    order = jnp.argsort(-score, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return rank < jnp.broadcast_to(jnp.asarray(count, rank.dtype), rank.shape)


def matrix_axes(place: Place) -> int:
    """How many of its last axes are one matrix, or one kernel of a convolution."""
    holder = place.holder
    if isinstance(holder, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return holder.num_spatial_dims + 2
    return 2


def _check(function: str, place: Place, spec: object) -> None:
    if not isinstance(spec, Unstructured | NM):
        raise ValueError(
            f"{function}: the `spec` of a Rule must be an Unstructured, an NM or None, "
            f"got {spec!r}."
        )
    if isinstance(place.value, AbstractWeight):
        raise ValueError(
            f"{function}: {place.path!r} must be a plain array, it is kept as "
            f"{type(place.value).__name__}. Undo it with `dequantize` first."
        )
