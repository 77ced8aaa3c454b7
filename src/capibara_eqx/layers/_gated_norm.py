import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import accumulate, check_last_axis, check_positive, check_size


class GatedRMSNorm(eqx.Module):
    r"""A root mean square norm over groups of channels, with a gate.

    $$y = w \odot \mathrm{norm}_g(x \odot \mathrm{silu}(z)) \quad\text{or}\quad
    y = w \odot \mathrm{norm}_g(x) \odot \mathrm{silu}(z), \qquad
    \mathrm{norm}_g(x) = \frac{x}{\sqrt{\mathrm{mean}_g(x^2) + \varepsilon}}$$

    with the gate inside, or outside if `norm_before_gate`. It ends the inner part of
    Mamba-2: Dao and Gu, *Transformers are SSMs*, arXiv 2405.21060. Computed in float32
    or wider, returned in the dtype of the input.

    !!! example

        ```python
        y = GatedRMSNorm(64, groups=2)(x, jnp.ones_like(x))   # (*batch, 64)
        ```
    """

    weight: Float[Array, " {self.d_model}"]
    d_model: int = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    norm_before_gate: bool = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `d_model`: size of the last axis.
        - `groups`: runs of neighbouring channels, each with a mean square of its own.
        - `norm_before_gate`: whether the gate scales what comes out of the norm.
        - `eps`: added to the mean square.
        - `dtype`: of the weight; float32 if not given.

        **Raises:**

        `ValueError` if a size or `eps` is not positive, or `groups` does not divide
        `d_model`.
        """
        check_size("d_model", d_model)
        check_size("groups", groups)
        check_positive("eps", eps)
        if d_model % groups:
            raise ValueError(
                f"`groups` must divide the {d_model} channels, got {groups}."
            )
        self.weight = jnp.ones((d_model,), jnp.float32 if dtype is None else dtype)
        self.d_model = d_model
        self.groups = groups
        self.norm_before_gate = norm_before_gate
        self.eps = eps

    @jax.named_scope("capibara_eqx.layers.GatedRMSNorm")
    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        z: Float[Array, "*batch d_model"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch d_model"]:
        """**Arguments:**

        - `x`: `(*batch, d_model)`.
        - `z`: gate before its SiLU, shape of `x`.
        - `key`: ignored.

        **Returns:**

        The shape and dtype of `x`.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_model` long, or `z` has another
        shape.
        """
        del key
        check_last_axis("GatedRMSNorm", "x", x, self.d_model)
        if z.shape != x.shape:
            raise ValueError(
                f"GatedRMSNorm: `z` must have the shape of `x`, {x.shape}, got shape "
                f"{z.shape}. Every element has a gate of its own: broadcast `z` first."
            )
        y = accumulate(x)
        gate = jax.nn.silu(z.astype(y.dtype))
        if not self.norm_before_gate:
            y = y * gate
        size = self.d_model // self.groups
        parts = y.reshape(*y.shape[:-1], self.groups, size)
        scale = jax.lax.rsqrt(jnp.mean(parts * parts, -1, keepdims=True) + self.eps)
        y = (parts * scale).reshape(y.shape)
        y = y * jnp.broadcast_to(self.weight.astype(y.dtype), y.shape)
        if self.norm_before_gate:
            y = y * gate
        return y.astype(x.dtype)
