import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import (
    accumulate,
    activate,
    check_choice,
    check_last_axis,
    check_size,
)
from ._bitnet import BitNet158
from ._linear import Linear


# What each of them puts on its gate.
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "relu2glu": "relu2"}


def check_gate(activation: str) -> None:
    """Raise `ValueError` unless `activation` names a gated linear unit."""
    check_choice("activation", activation, GATES)


class GLU(eqx.Module):
    r"""A gated feed-forward layer of three maps.

    $$y = W_{down}\,(\sigma(W_{gate}\, x) \odot W_{up}\, x)$$

    with $\sigma$ the silu for `"swiglu"`, the exact gelu for `"geglu"`, the relu for
    `"reglu"`, its square for `"relu2glu"`. Shazeer, *GLU Variants Improve Transformer*,
    arXiv 2002.05202; the last in Ma et al., *BitNet b1.58 2B4T Technical Report*, arXiv
    2504.12285. A third more parameters than an `MLP` of the same `d_ff`: two thirds of
    its width cost the same.

    !!! example

        ```python
        layer = GLU(64, 172, "geglu", key=jax.random.key(0))
        y = layer(x)                                   # (*batch, 64)
        ```
    """

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear | BitNet158
    d_model: int = eqx.field(static=True)
    d_ff: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "swiglu",
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of input and output.
        - `d_ff`: width inside.
        - `activation`: `"swiglu"`, `"geglu"`, `"reglu"` or `"relu2glu"`.
        - `use_bias`: whether the three maps have biases.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, see `Linear`.

        **Raises:**

        `ValueError` for a size that is not positive or an unknown `activation`.
        """
        check_gate(activation)
        maps = _projections(d_model, d_ff, use_bias, dtype, key)
        self.gate_proj, self.up_proj, self.down_proj = maps
        self.d_model = d_model
        self.d_ff = d_ff
        self.activation = activation

    @jax.named_scope("capibara_eqx.layers.GLU")
    def __call__(
        self, x: Float[Array, "*batch d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_model"]:
        """**Arguments:**

        - `x`: `(*batch, d_model)`.
        - `key`: ignored.

        **Returns:**

        The same shape and dtype.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_model` long.
        """
        del key
        check_last_axis("GLU", "x", x, self.d_model)
        return _gated(self, GATES[self.activation], x)


class SwiGLU(eqx.Module):
    r"""The gated feed-forward layer with a silu on its gate.

    $$y = W_{down}\,(\mathrm{silu}(W_{gate}\, x) \odot W_{up}\, x)$$

    Shazeer, *GLU Variants Improve Transformer*, arXiv 2002.05202. `GLU` has the other
    activations.

    !!! example

        ```python
        layer = SwiGLU(64, 172, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, 64)
        ```
    """

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear | BitNet158
    d_model: int = eqx.field(static=True)
    d_ff: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of input and output.
        - `d_ff`: width inside.
        - `use_bias`: whether the three maps have biases.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, see `Linear`.

        **Raises:**

        `ValueError` for a size that is not positive.
        """
        maps = _projections(d_model, d_ff, use_bias, dtype, key)
        self.gate_proj, self.up_proj, self.down_proj = maps
        self.d_model = d_model
        self.d_ff = d_ff

    @jax.named_scope("capibara_eqx.layers.SwiGLU")
    def __call__(
        self, x: Float[Array, "*batch d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_model"]:
        """**Arguments:**

        - `x`: `(*batch, d_model)`.
        - `key`: ignored.

        **Returns:**

        The same shape and dtype.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_model` long.
        """
        del key
        check_last_axis("SwiGLU", "x", x, self.d_model)
        return _gated(self, "silu", x)


def _projections(d_model, d_ff, use_bias, dtype, key) -> tuple[Linear, Linear, Linear]:
    check_size("d_model", d_model)
    check_size("d_ff", d_ff)
    gate_key, up_key, down_key = jax.random.split(key, 3)
    return (
        Linear(d_model, d_ff, use_bias, dtype, key=gate_key),
        Linear(d_model, d_ff, use_bias, dtype, key=up_key),
        Linear(d_ff, d_model, use_bias, dtype, key=down_key),
    )


def _gated(layer: GLU | SwiGLU, activation: str, x: Array) -> Array:
    gate = activate(activation, accumulate(layer.gate_proj(x)))
    hidden = gate * accumulate(layer.up_proj(x))
    return layer.down_proj(hidden.astype(x.dtype))
