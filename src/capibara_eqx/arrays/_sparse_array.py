import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ..kernels import pack_codes, unpack_codes
from ._nm import NM, nm_places
from ._weight import AbstractWeight, apply_weight


class SparseArray(AbstractWeight):
    """A weight of which every few neighbours keep a few values; see `NM`.

    - `values`: those that stay, group by group, `(*stack, out, kept)`.
    - `places`: where in its group each of them lies, packed in as few bits as hold it,
        two for groups of four, `(*stack, out, bytes)`.

    The values are parameters like those of the whole weight: their places stay.

    !!! example

        ```python
        weight = SparseArray.compress(linear.weight, NM(2, 4))
        y = weight @ x                                 # (out,)
        ```
    """

    values: Float[Array, "*stack out kept"]
    places: UInt8[Array, "*stack out bytes"]
    spec: NM = eqx.field(static=True)
    in_features: int = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    @classmethod
    def compress(cls, weight: Float[Array, "*stack out in"], spec: NM) -> "SparseArray":
        """The largest values of a weight and their places.

        **Arguments:**

        - `weight`: `(*stack, out, in)`.
        - `spec`: how many of how many neighbours stay.

        **Raises:**

        `ValueError` if groups do not fit the inputs.

        !!! example

            ```python
            weight = SparseArray.compress(jnp.ones((3, 8)), NM(2, 4))
            ```
        """
        places = nm_places(weight, spec)
        return cls.from_places(weight, places, spec)

    @classmethod
    def from_places(
        cls,
        weight: Float[Array, "*stack out in"],
        places: Int[Array, "*stack out groups n"],
        spec: NM,
    ) -> "SparseArray":
        """The values of a weight at places that something else chose."""
        groups = weight.reshape(*weight.shape[:-1], -1, spec.m)
        values = jnp.take_along_axis(groups, places, axis=-1)
        flat = (*weight.shape[:-1], values.shape[-2] * spec.n)
        return cls(
            values=values.reshape(flat),
            places=pack_codes(places.astype(jnp.uint8).reshape(flat), spec.index_bits),
            spec=spec,
            in_features=weight.shape[-1],
            dtype=jnp.dtype(weight.dtype),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.in_features)

    @property
    def density(self) -> float:
        """The share of values that are kept."""
        return self.spec.n / self.spec.m

    @property
    def unpacked_places(self) -> Int[Array, "*stack out groups n"]:
        """Where in its group each value lies."""
        spec = self.spec
        places = unpack_codes(self.places, spec.index_bits, self.values.shape[-1])
        grouped = (*self.values.shape[:-1], self.in_features // spec.m, spec.n)
        return places.astype(jnp.int32).reshape(grouped)

    def dense(self) -> Float[Array, "*stack out in"]:
        places = self.unpacked_places
        at = jax.nn.one_hot(places, self.spec.m, dtype=self.values.dtype)
        matrix = jnp.einsum("...n,...nm->...m", self.values.reshape(places.shape), at)
        return matrix.reshape(self.shape).astype(self.dtype)

    def product(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_weight(self.dense(), x)
