import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Integer, Key, PRNGKeyArray, UInt32

from ..internal import accumulate, accumulator_dtype, promote_dtypes
from ._lora import LoRA
from ._weight import AbstractWeight, apply_weight, as_array


class LoRAArray(AbstractWeight):
    r"""A weight and an update of low rank beside it; see `LoRA`.

    $$x\,W'^T = x\,W^T + s\,(x A^T) B^T$$

    is how a product is computed: $W + s\,B A$ is never written out, but for the norms
    of its rows that DoRA divides by. Dropout acts on the $x$ of $A$ in such products;
    the array itself, `dense()`, and rows of a table have none.

    - `base`: the weight $W$, `(*stack, out, in)`: an array, or a node that stands for
        one, such as an `AffineArray`. Gradients reach it as any other array: what is to
        stay frozen is left out by the filter, `transforms.trainable_spec`.
    - `a`, `b`: `(*stack, rank, in)` and `(*stack, out, rank)`.
    - `magnitude`: $m$ of DoRA, `(*stack, out)`, else `None`.
    - `key`: for dropout, one for every matrix of a stack, or `None`. A weight takes no
        key when it is used, so it has one: `transforms.with_dropout_key`.
    - `inference`: whether dropout is off; `equinox.nn.inference_mode` sets it.

    !!! example

        ```python
        weight = LoRAArray.of(linear.weight, LoRA(8), key=jax.random.key(0))
        y = weight @ x                                 # (out,)
        ```
    """

    # The lengths of DoRA: smaller ones make a smaller weight, not a simpler update.
    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"magnitude"})

    base: Float[Array, "*stack out in"] | AbstractWeight
    a: Float[Array, "*stack rank in"]
    b: Float[Array, "*stack out rank"]
    magnitude: Float[Array, "*stack out"] | None
    key: Key[Array, "*stack"] | UInt32[Array, "*stack words"] | None
    inference: bool
    spec: LoRA = eqx.field(static=True)

    def __init__(
        self,
        base: Float[Array, "*stack out in"] | AbstractWeight,
        a: Float[Array, "*stack rank in"],
        b: Float[Array, "*stack out rank"],
        spec: LoRA,
        magnitude: Float[Array, "*stack out"] | None = None,
        key: Key[Array, "*stack"] | UInt32[Array, "*stack words"] | None = None,
        inference: bool = False,
    ):
        """**Arguments:** the parts, as above; `LoRAArray.of` makes new ones."""
        self.base = base
        self.a = a
        self.b = b
        self.magnitude = magnitude
        self.key = key
        self.inference = inference
        self.spec = spec

    @classmethod
    def of(
        cls,
        base: Float[Array, "*stack out in"] | AbstractWeight,
        spec: LoRA,
        *,
        key: PRNGKeyArray,
    ) -> "LoRAArray":
        r"""A new adapter, which changes nothing yet.

        **Arguments:**

        - `base`: the weight, `(*stack, out, in)`.
        - `spec`: what kind of adapter.
        - `key`: for $A$, uniform in $\pm 1/\sqrt{\mathrm{in}}$; $B$ is zero.

        **Raises:**

        `ValueError` if the rank is above that of the weight.

        !!! example

            ```python
            weight = LoRAArray.of(jnp.ones((3, 5)), LoRA(2), key=jax.random.key(0))
            ```
        """
        *stack, out, size = base.shape
        if spec.rank > min(out, size):
            raise ValueError(
                f"`rank` must be at most {min(out, size)} for a weight of {out} "
                f"outputs and {size} inputs, got {spec.rank}: no update of it has a "
                "higher one."
            )
        dtype = jnp.dtype(spec.dtype or accumulator_dtype(base.dtype))
        limit = 1 / math.sqrt(size)
        shape = (*stack, spec.rank, size)
        magnitude = None
        if spec.dora:
            magnitude = _row_norms(accumulate(as_array(base))).astype(dtype)
        return cls(
            base=base,
            a=jax.random.uniform(key, shape, dtype, -limit, limit),
            b=jnp.zeros((*stack, out, spec.rank), dtype),
            spec=spec,
            magnitude=magnitude,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.base.dtype)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.base, *self.adapter))

    @property
    def adapter(self) -> tuple[Array, ...]:
        """The arrays beside the base."""
        magnitude = () if self.magnitude is None else (self.magnitude,)
        return (self.a, self.b, *magnitude)

    def astype(self, dtype: DTypeLike) -> "LoRAArray":
        return eqx.tree_at(lambda node: node.base, self, self.base.astype(dtype))

    def update(self) -> Float[Array, "*stack out in"]:
        r"""$s\,B A$, in float32 or wider."""
        return self.spec.scale * jnp.matmul(accumulate(self.b), accumulate(self.a))

    def row_norms(self) -> Float[Array, "*stack out"]:
        r"""$\mathrm{sg}\,\lVert (W + s\,B A)_o \rVert$, 1 for rows of zeros."""
        return _divisors(self._total())

    def dense(self) -> Float[Array, "*stack out in"]:
        return _with_lengths(self._total(), self.magnitude).astype(self.dtype)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        # In the wider of the two, so that bfloat16 inputs meet all of the adapter.
        wide = promote_dtypes(x.dtype, self.a.dtype)
        low = apply_weight(self.a, self._dropped(x).astype(wide))
        update = accumulate(apply_weight(self.b, low))
        y = apply_weight(self.base, x).astype(update.dtype) + self.spec.scale * update
        if self.magnitude is not None:
            factor = self.magnitude.astype(y.dtype) / self.row_norms().astype(y.dtype)
            y = y * jnp.broadcast_to(factor, y.shape)
        return y.astype(x.dtype)

    def rows(self, index: Integer[Array, "*batch"]) -> Float[Array, "*batch in"]:
        rows = accumulate(self.base[index])
        low = apply_weight(accumulate(self.a).T, accumulate(self.b[index]))
        total = rows + (self.spec.scale * low).astype(rows.dtype)
        at = None if self.magnitude is None else self.magnitude[index]
        return _with_lengths(total, at).astype(self.dtype)

    def with_key(self, key: PRNGKeyArray | None) -> "LoRAArray":
        """The same weight with a key for dropout, split along the stack axes."""
        stack = self.shape[:-2]
        if key is not None and stack:
            key = jax.random.split(key, stack)
        return eqx.tree_at(
            lambda node: node.key, self, key, is_leaf=lambda node: node is None
        )

    @property
    def has_active_dropout(self) -> bool:
        """Whether products zero inputs of the adapter at random."""
        return self.spec.dropout > 0 and not self.inference

    def _dropped(self, x: Array) -> Array:
        if not self.has_active_dropout:
            return x
        if self.key is None:
            raise ValueError(
                "LoRAArray: dropout is active and the weight has no key. Give every "
                "adapter one with `transforms.with_dropout_key(model, key)`, a new one "
                "each step, or turn dropout off with `eqx.nn.inference_mode(model)`."
            )
        keep = 1 - self.spec.dropout
        mask = jax.random.bernoulli(self.key, keep, x.shape)
        return jnp.where(mask, x / keep, jnp.zeros_like(x))

    def _total(self) -> Array:
        """The array before its rows get their lengths."""
        base = accumulate(as_array(self.base))
        return base + self.update().astype(base.dtype)


def _row_norms(matrix: Array) -> Array:
    return jnp.linalg.norm(matrix, axis=-1)


def _divisors(rows: Array) -> Array:
    """The lengths of rows, as constants; 1 for rows of zeros."""
    norms = jax.lax.stop_gradient(_row_norms(rows))
    return jnp.where(norms == 0, 1, norms)


def _with_lengths(rows: Array, magnitude: Array | None) -> Array:
    """Rows scaled to the lengths that DoRA learns."""
    if magnitude is None:
        return rows
    factor = magnitude.astype(rows.dtype) / _divisors(rows)
    return rows * jnp.broadcast_to(factor[..., None], rows.shape)
