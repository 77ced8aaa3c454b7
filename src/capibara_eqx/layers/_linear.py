import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..arrays import apply_weight
from ..internal import check_last_axis, check_size


class Linear(eqx.Module):
    r"""An affine map of the last axis, $y = W x + b$.

    Field names and weight layout are those of `equinox.nn.Linear`; any number of
    leading axes is allowed. It computes in the dtype of its input, whatever the dtype
    of its parameters.

    !!! example

        ```python
        layer = Linear(64, 32, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, 64) -> (*batch, 32)
        ```
    """

    weight: Float[Array, "{self.out_features} {self.in_features}"]
    bias: Float[Array, " {self.out_features}"] | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `in_features`, `out_features`: sizes of the last axis before and after.
        - `use_bias`: whether to add a bias.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, uniform in $\pm 1/\sqrt{\mathrm{in}}$.

        **Raises:**

        `ValueError` for a size that is not positive.
        """
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        weight_key, bias_key = jax.random.split(key)
        dtype = jnp.float32 if dtype is None else dtype
        shape = (out_features, in_features)
        self.weight = uniform(weight_key, shape, in_features, dtype)
        self.bias = None
        if use_bias:
            self.bias = uniform(bias_key, (out_features,), in_features, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias

    @jax.named_scope("capibara_eqx.layers.Linear")
    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """**Arguments:**

        - `x`: `(*batch, in_features)`.
        - `key`: ignored.

        **Returns:**

        `(*batch, out_features)`, in the dtype of `x`.

        **Raises:**

        `ValueError` if the last axis of `x` is not `in_features` long.
        """
        del key
        check_last_axis("Linear", "x", x, self.in_features)
        y = apply_weight(self.weight, x)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)
        return y


def uniform(key, shape, fan_in, dtype) -> Array:
    """Initial values of maps of `fan_in` numbers, uniform in ±1/sqrt(fan_in)."""
    limit = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -limit, limit)
