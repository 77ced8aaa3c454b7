import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..arrays import AbstractWeight, LoRA, LoRAArray, apply_weight
from ..internal import check_last_axis
from ._linear import Linear


class LoRALinear(eqx.Module):
    r"""An affine map with a trainable update of low rank beside its matrix.

    $$y = W x + s\,B A\,\mathrm{dropout}(x) + b, \quad s = \alpha / r$$

    with $B = 0$ at first. Hu et al., *LoRA: Low-Rank Adaptation of Large Language
    Models*, arXiv 2106.09685; `arrays.LoRA` has the other forms. The weight is an
    `arrays.LoRAArray`: `transforms.trainable_spec` is the filter with which $A$ and $B$
    alone learn, $W$ and the bias stay, `transforms.merge` adds the update to $W$, and
    `equinox.nn.inference_mode` turns dropout off. To add adapters to a model that is
    there, `transforms.lora` needs no layer of its own.

    !!! example

        ```python
        layer = LoRALinear(64, 32, rank=8, alpha=16, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, 64) -> (*batch, 32)
        ```
    """

    weight: Float[Array, "{self.out_features} {self.in_features}"] | AbstractWeight
    bias: Float[Array, " {self.out_features}"] | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    rank: int = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: int | float | None = None,
        dropout: int | float = 0.0,
        use_bias: bool = True,
        rs: bool = False,
        dora: bool = False,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `in_features`, `out_features`: sizes of the last axis before and after.
        - `rank`: $r$, at most the smaller of both.
        - `alpha`: $\alpha$; as `rank` if not given.
        - `dropout`: probability of zeroing an input of $A$.
        - `use_bias`: whether to add a bias.
        - `rs`, `dora`: see `arrays.LoRA`.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values of $W$, $A$ and the bias, uniform in
            $\pm 1/\sqrt{\mathrm{in}}$.

        **Raises:**

        `ValueError` for a size that is not positive, a rank that is too high, an
        `alpha` that is not positive, or a `dropout` outside of [0, 1).
        """
        linear_key, adapter_key = jax.random.split(key)
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        spec = LoRA(rank, alpha, dropout, rs, dora, dtype)
        linear = Linear(in_features, out_features, use_bias, dtype, key=linear_key)
        self.weight = LoRAArray.of(linear.weight, spec, key=adapter_key)
        self.bias = linear.bias
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.rank = rank

    @jax.named_scope("capibara_eqx.layers.LoRALinear")
    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """**Arguments:**

        - `x`: `(*batch, in_features)`.
        - `key`: for dropout; needed while it is active, unless
            `transforms.with_dropout_key` gave the weight one.

        **Returns:**

        `(*batch, out_features)`, in the dtype of `x`.

        **Raises:**

        `ValueError` if the last axis of `x` is not `in_features` long, or if dropout is
        active and there is no `key`.
        """
        check_last_axis("LoRALinear", "x", x, self.in_features)
        y = apply_weight(self._weight_with(key), x)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)
        return y

    def _weight_with(self, key: PRNGKeyArray | None) -> Array | AbstractWeight:
        weight = self.weight
        if not isinstance(weight, LoRAArray) or not weight.has_active_dropout:
            return weight
        if key is not None:
            return weight.with_key(key)
        if weight.key is None:
            raise ValueError(
                "LoRALinear: `key` is needed while dropout is active. Pass `key=...`, "
                "or turn it off with `eqx.nn.inference_mode(model)`."
            )
        return weight
