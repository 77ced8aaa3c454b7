import abc
import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Integer


class AbstractWeight(eqx.Module):
    """A PyTree node that stands where the weight of a layer stood.

    It has what layers use of a matrix `(out, in)`: `weight @ x`, rows `weight[i]`,
    `shape`, `ndim`, `size`, `dtype`, `astype`, `T`; `jax.numpy` functions take it as
    the array it stands for. With layer or expert axes in front its parts carry them
    too, so that `vmap` and `scan` slice it as they slice an array. Functions of
    `jax.lax` do not take it: give them `dense()`.

    !!! example

        ```python
        weight: AbstractWeight = AffineArray.compress(jnp.ones((3, 5)), Affine(4))
        weight @ jnp.ones(5)                           # (3,)
        ```
    """

    dtype: eqx.AbstractVar[jnp.dtype]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "*rows in"]:
        """The array that it stands for, in its `dtype`."""

    @abc.abstractmethod
    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x @ weight.T`, in the dtype of `x`; for a weight without axes in front."""

    def rows(self, index: Integer[Array, "*batch"]) -> Float[Array, "*batch in"]:
        """Rows of a weight without axes in front, as from a table of embeddings."""
        return self.dense()[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it keeps."""
        arrays = [leaf for leaf in jax.tree.leaves(self) if eqx.is_array(leaf)]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def T(self) -> Array:
        return self.dense().T

    def astype(self, dtype: DTypeLike) -> "AbstractWeight":
        """The same weight, that stands for an array of another dtype."""
        # Not by `eqx.tree_at`, which replaces leaves: the dtype is static.
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def __jax_array__(self) -> Array:
        return self.dense()

    def __getitem__(self, index: Any) -> Array:
        kind = getattr(index, "dtype", type(index))
        if self.ndim == 2 and kind is not bool and jnp.issubdtype(kind, jnp.integer):
            return self.rows(jnp.asarray(index))
        return self.dense()[index]

    def __matmul__(self, x: Array) -> Array:
        if self.ndim != 2 or x.ndim > 2:
            return jnp.matmul(self.dense().astype(x.dtype), x)
        return self.product(x) if x.ndim == 1 else self.product(x.T).T

    def __rmatmul__(self, x: Array) -> Array:
        return jnp.matmul(x, self.dense().astype(x.dtype))


def apply_weight(
    weight: Float[Array, "out in"] | AbstractWeight, x: Float[Array, "*batch in"]
) -> Float[Array, "*batch out"]:
    """`x @ weight.T` in the dtype of `x`, for an array or what stands for one.

    `x @ weight.T` itself would write the matrix out, since arrays take everything that
    can be made an array.

    !!! example

        ```python
        y = apply_weight(layer.weight, x)              # (*batch, out)
        ```
    """
    if isinstance(weight, AbstractWeight):
        return weight.product(x)
    return x @ weight.astype(x.dtype).T


def as_array(weight: Array | AbstractWeight) -> Array:
    """The array itself, or the one that a node stands for.

    !!! example

        ```python
        norm = jnp.linalg.norm(as_array(layer.weight))
        ```
    """
    return weight.dense() if isinstance(weight, AbstractWeight) else weight


def is_weight(node: Any) -> bool:
    """Whether it stands for an array; for `is_leaf`.

    !!! example

        ```python
        nodes = jax.tree.leaves(model, is_leaf=is_weight)
        ```
    """
    return isinstance(node, AbstractWeight)


def straight_through(value: Array, through: Array) -> Array:
    """`value`, to the bit, with the derivatives of `through`."""
    return through - jax.lax.stop_gradient(through) + jax.lax.stop_gradient(value)


def take_rows(
    weight: AbstractWeight, index: Integer[Array, "*batch"]
) -> Float[Array, "*batch in"]:
    """Rows of a matrix whose parts have a row for each of its rows, or one for all."""

    def take(part):
        if part.ndim == 0:
            return part  # of inputs, which a row has none of
        at = jnp.zeros_like(index) if part.shape[0] == 1 else index
        return part[at][..., None, :]

    # Each is a matrix of one row.
    return jax.tree.map(take, weight).dense()[..., 0, :]
