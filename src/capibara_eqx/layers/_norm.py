import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import accumulate, check_last_axis, check_positive, check_size


class RMSNorm(eqx.Module):
    r"""Scales the last axis to unit root mean square.

    $$y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \varepsilon}} \cdot w$$

    Zhang and Sennrich, *Root Mean Square Layer Normalization*, arXiv 1910.07467.
    Computed in float32 or wider, returned in the dtype of the input. A zero input
    gives zeros with finite gradients.

    !!! example

        ```python
        y = RMSNorm(64)(x)                             # (*batch, 64), any dtype
        ```
    """

    weight: Float[Array, " {self.d_model}"] | None
    d_model: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        use_weight: bool = True,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `d_model`: size of the last axis.
        - `eps`: added to the mean square.
        - `use_weight`: whether to scale each channel by a learned weight, at first 1.
        - `dtype`: of the weight; float32 if not given.

        **Raises:**

        `ValueError` if `d_model` or `eps` is not positive.
        """
        check_size("d_model", d_model)
        check_positive("eps", eps)
        dtype = jnp.float32 if dtype is None else dtype
        self.weight = jnp.ones((d_model,), dtype) if use_weight else None
        self.d_model = d_model
        self.eps = eps

    @jax.named_scope("capibara_eqx.layers.RMSNorm")
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
        check_last_axis("RMSNorm", "x", x, self.d_model)
        y = accumulate(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            y = y * jnp.broadcast_to(self.weight.astype(y.dtype), y.shape)
        return y.astype(x.dtype)


class LayerNorm(eqx.Module):
    r"""Shifts the last axis to zero mean and scales it to unit variance.

    $$y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \varepsilon}} w + b$$

    Ba, Kiros and Hinton, *Layer Normalization*, arXiv 1607.06450. Computed in float32
    or wider, returned in the dtype of the input. A constant input gives the bias with
    finite gradients.

    !!! example

        ```python
        y = LayerNorm(64)(x)                           # (*batch, 64), any dtype
        ```
    """

    weight: Float[Array, " {self.d_model}"] | None
    bias: Float[Array, " {self.d_model}"] | None
    d_model: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        use_weight: bool = True,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `d_model`: size of the last axis.
        - `eps`: added to the variance.
        - `use_weight`, `use_bias`: whether to scale and shift each channel by learned
            parameters, at first 1 and 0.
        - `dtype`: of the parameters; float32 if not given.

        **Raises:**

        `ValueError` if `d_model` or `eps` is not positive.
        """
        check_size("d_model", d_model)
        check_positive("eps", eps)
        dtype = jnp.float32 if dtype is None else dtype
        self.weight = jnp.ones((d_model,), dtype) if use_weight else None
        self.bias = jnp.zeros((d_model,), dtype) if use_bias else None
        self.d_model = d_model
        self.eps = eps

    @jax.named_scope("capibara_eqx.layers.LayerNorm")
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
        check_last_axis("LayerNorm", "x", x, self.d_model)
        y = accumulate(x)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            y = y * jnp.broadcast_to(self.weight.astype(y.dtype), y.shape)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)
        return y.astype(x.dtype)
