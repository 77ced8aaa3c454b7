import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..internal import accumulate
from ..kernels import round_tokens
from ._affine import Affine, affine_steps, fake_affine
from ._nm import NM, fake_nm
from ._ternary import Ternary, fake_ternary, ternary_codes
from ._weight import AbstractWeight, apply_weight


class FakeQuantArray(AbstractWeight):
    """A weight in training that already computes as its compressed form will.

    Forward, it stands for what `transforms.convert` makes of it; backward, the rounding
    is as if it were not there, so that the whole weight learns.

    - `weight`: `(*stack, out, in)`.
    - `step`: of every group where the spec learns it, else `None`.

    !!! example

        ```python
        weight = FakeQuantArray.of(linear.weight, Ternary())
        ```
    """

    weight: Float[Array, "*stack out in"]
    step: Float[Array, "*stack rows groups"] | None
    spec: Affine | Ternary | NM = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    @classmethod
    def of(
        cls, weight: Float[Array, "*stack out in"], spec: Affine | Ternary | NM
    ) -> "FakeQuantArray":
        """A weight, and a step where the spec learns one.

        !!! example

            ```python
            weight = FakeQuantArray.of(jnp.ones((3, 5)), Affine(4, learned_step=True))
            ```
        """
        step = None
        if isinstance(spec, Affine) and spec.learned_step:
            step, _ = affine_steps(weight, spec)
        elif isinstance(spec, Ternary) and spec.learned_step:
            _, step = ternary_codes(weight, spec)
        return cls(weight=weight, step=step, spec=spec, dtype=jnp.dtype(weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dense(self) -> Float[Array, "*stack out in"]:
        return self._rounded().astype(self.dtype)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        # In float32 or wider, as the packed form is read.
        wide = accumulate(x)
        if getattr(self.spec, "activations", None) == "int8":
            wide = round_tokens(x)
        weight = self._rounded().astype(wide.dtype)
        return apply_weight(weight, wide).astype(x.dtype)

    def _rounded(self) -> Array:
        if isinstance(self.spec, NM):
            return fake_nm(self.weight, self.spec)
        if isinstance(self.spec, Ternary):
            return fake_ternary(self.weight, self.step, self.spec)
        return fake_affine(self.weight, self.step, self.spec)
