from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..internal import accumulate
from ..kernels import round_tokens
from ._affine import Affine, affine_steps, fake_affine
from ._input_scale import check_input_scale
from ._nm import NM, fake_nm
from ._ternary import Ternary, fake_ternary, ternary_codes
from ._weight import AbstractWeight, apply_weight


class FakeQuantArray(AbstractWeight):
    """A weight in training that already computes as its compressed form will.

    Forward, it stands for what `transforms.convert` makes of it; backward, the rounding
    is as if it were not there, so that the whole weight learns.

    - `weight`: `(*stack, out, in)`.
    - `step`: of every group where the spec learns it, else `None`.
    - `input_scale`: the step of all inputs with `"static_int8"`, `(*stack,)`, or
        `None`.

    !!! example

        ```python
        weight = FakeQuantArray.of(linear.weight, Ternary())
        ```
    """

    # It is measured, and only its own size is right.
    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"input_scale"})

    weight: Float[Array, "*stack out in"]
    step: Float[Array, "*stack rows groups"] | None
    spec: Affine | Ternary | NM = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)
    input_scale: Float[Array, "*stack"] | None = None

    @classmethod
    def of(
        cls,
        weight: Float[Array, "*stack out in"],
        spec: Affine | Ternary | NM,
        input_scale: Float[Array, "*stack"] | None = None,
    ) -> "FakeQuantArray":
        """A weight, and a step where the spec learns one.

        **Arguments:**

        - `weight`: `(*stack, out, in)`.
        - `spec`: how it is to be rounded.
        - `input_scale`: the step of all inputs, with `activations="static_int8"`.

        **Raises:**

        `ValueError` for an `input_scale` too many or too few, or of another shape.

        !!! example

            ```python
            weight = FakeQuantArray.of(jnp.ones((3, 5)), Affine(4, learned_step=True))
            ```
        """
        check_input_scale(spec, input_scale, weight.shape[:-2])
        step = None
        if isinstance(spec, Affine) and spec.learned_step:
            step, _ = affine_steps(weight, spec)
        elif isinstance(spec, Ternary) and spec.learned_step:
            _, step = ternary_codes(weight, spec)
        return cls(
            weight=weight,
            step=step,
            spec=spec,
            dtype=jnp.dtype(weight.dtype),
            input_scale=input_scale,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dense(self) -> Float[Array, "*stack out in"]:
        return self._rounded().astype(self.dtype)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        wide = self.rounded_inputs(x)
        weight = self._rounded().astype(wide.dtype)
        return apply_weight(weight, wide).astype(x.dtype)

    def rounded_inputs(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch in"]:
        """What is multiplied, in float32 or wider, as the packed form is read."""
        if getattr(self.spec, "activations", None) is None:
            return accumulate(x)
        return round_tokens(x, self.input_scale)

    def _rounded(self) -> Array:
        if isinstance(self.spec, NM):
            return fake_nm(self.weight, self.spec)
        if isinstance(self.spec, Ternary):
            return fake_ternary(self.weight, self.step, self.spec)
        return fake_affine(self.weight, self.step, self.spec)
