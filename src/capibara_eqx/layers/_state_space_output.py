import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import accumulate, activate
from ._dropout import Dropout
from ._linear import Linear


class StateSpaceOutput(eqx.Module):
    r"""What S4 and S4D do with the outputs of their channels, which alone do not mix.

    $$y = a \odot \sigma(b), \quad a, b = W\,\mathrm{dropout}(\mathrm{gelu}(x)) + c$$
    """

    dropout: Dropout
    proj: Linear

    def __init__(
        self,
        d_model: int,
        dropout_rate: float,
        dtype: DTypeLike | None,
        *,
        key: PRNGKeyArray,
    ):
        self.dropout = Dropout(dropout_rate)
        self.proj = Linear(d_model, 2 * d_model, dtype=dtype, key=key)

    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        dtype: DTypeLike,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch d_model"]:
        """With dropout; computed and returned in `dtype`."""
        return self._gated(self.dropout(self._activated(x, dtype), key=key))

    def streamed(
        self, x: Float[Array, "*batch d_model"], dtype: DTypeLike
    ) -> Float[Array, "*batch d_model"]:
        """Without dropout."""
        return self._gated(self._activated(x, dtype))

    def _activated(self, x, dtype):
        return activate("gelu", accumulate(x)).astype(dtype)

    def _gated(self, x):
        return jax.nn.glu(accumulate(self.proj(x))).astype(x.dtype)
