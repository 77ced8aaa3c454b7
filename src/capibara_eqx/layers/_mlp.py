import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import (
    accumulate,
    activate,
    check_activation,
    check_last_axis,
    check_probability,
    check_size,
)
from ._dropout import Dropout
from ._linear import Linear


class MLP(eqx.Module):
    r"""The feed-forward layer of two maps with an activation between them.

    $$y = W_{down}\,\mathrm{dropout}(\sigma(W_{up}\, x + b_{up})) + b_{down}$$

    Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, with the exact gelu
    by default.

    !!! example

        ```python
        layer = MLP(64, 256, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, 64)
        ```
    """

    up_proj: Linear
    dropout: Dropout
    down_proj: Linear
    d_model: int = eqx.field(static=True)
    d_ff: int = eqx.field(static=True)
    d_out: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "gelu",
        use_bias: bool = True,
        d_out: int | None = None,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of the input.
        - `d_ff`: width inside.
        - `activation`: `"silu"`, `"gelu"`, `"relu"` or `"relu2"`, its square.
        - `use_bias`: whether the two maps have biases.
        - `d_out`: width of the output; `d_model` if not given.
        - `dropout`: probability of dropping an element after the activation.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, see `Linear`.

        **Raises:**

        `ValueError` for a size that is not positive, an unknown `activation`, or a
        `dropout` outside [0, 1].
        """
        d_out = d_model if d_out is None else d_out
        sizes = {"d_model": d_model, "d_ff": d_ff, "d_out": d_out}
        for name, value in sizes.items():
            check_size(name, value)
        check_activation(activation)
        check_probability("dropout", dropout)
        up_key, down_key = jax.random.split(key)
        self.up_proj = Linear(d_model, d_ff, use_bias, dtype, key=up_key)
        self.dropout = Dropout(dropout)
        self.down_proj = Linear(d_ff, d_out, use_bias, dtype, key=down_key)
        self.d_model = d_model
        self.d_ff = d_ff
        self.d_out = d_out
        self.activation = activation

    @jax.named_scope("capibara_eqx.layers.MLP")
    def __call__(
        self, x: Float[Array, "*batch d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_out"]:
        """**Arguments:**

        - `x`: `(*batch, d_model)`.
        - `key`: for dropout.

        **Returns:**

        `(*batch, d_out)`, in the dtype of `x`.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_model` long, or if dropout is
        active and there is no `key`.
        """
        check_last_axis("MLP", "x", x, self.d_model)
        hidden = activate(self.activation, accumulate(self.up_proj(x))).astype(x.dtype)
        return self.down_proj(self.dropout(hidden, key=key))
