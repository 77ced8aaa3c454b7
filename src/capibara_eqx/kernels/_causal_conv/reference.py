import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate


def causal_conv(
    x: Float[Array, "*batch seq c_in"],
    weight: Float[Array, "c_out c_in_per_group width"],
    bias: Float[Array, " c_out"] | None,
    dilation: int,
    groups: int,
    history: Float[Array, "*batch reach c_in"],
    document: Int[Array, "*batch reach_and_seq"] | None,
    activation: str | None,
) -> Float[Array, "*batch seq c_out"]:
    """The definition of `kernels.causal_conv`: every window gathered, then summed."""
    *batch, seq, _ = x.shape
    c_out, per_group, width = weight.shape
    inputs = jnp.concatenate([accumulate(history), accumulate(x)], axis=-2)
    current = jnp.arange(seq)[:, None] + history.shape[-2]
    taps = current - dilation * jnp.arange(width - 1, -1, -1)[None]
    windows = inputs[..., taps, :]
    if document is not None:
        same = document[..., taps] == document[..., current]
        windows = jnp.where(same[..., None], windows, 0.0)
    windows = windows.reshape(*batch, seq, width, groups, per_group)
    weight = accumulate(weight).reshape(groups, c_out // groups, per_group, width)
    y = jnp.einsum("...kgi,goik->...go", windows, weight)
    y = y.reshape(*batch, seq, c_out)
    if bias is not None:
        y = y + jnp.broadcast_to(accumulate(bias), y.shape)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype)
