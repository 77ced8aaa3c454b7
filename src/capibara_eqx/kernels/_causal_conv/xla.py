import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate, accumulator_dtype


def causal_conv(
    x: Float[Array, "*batch seq c_in"],
    weight: Float[Array, "c_out c_in_per_group width"],
    bias: Float[Array, " c_out"] | None,
    dilation: int,
    groups: int,
    history: Float[Array, "*batch reach c_in"],
    document: Int[Array, "*batch reach_and_seq"] | None,
) -> Float[Array, "*batch seq c_out"]:
    """`kernels.causal_conv` as a sum over taps of shifted inputs.

    One multiply-add a tap that XLA fuses into one pass for a depthwise convolution,
    one matmul a tap otherwise. The general convolution of XLA is many times slower on
    CPU when every channel is its own group.
    """
    *batch, seq, c_in = x.shape
    c_out, per_group, width = weight.shape
    reach = history.shape[-2]
    inputs = jnp.concatenate([history.astype(x.dtype), x], axis=-2)
    dtype = accumulator_dtype(x.dtype)

    def tap(k):
        start = reach - dilation * (width - 1 - k)
        window = inputs[..., start : start + seq, :]
        if document is not None:
            same = document[..., start : start + seq] == document[..., reach:]
            window = jnp.where(same[..., None], window, jnp.zeros_like(window))
        if per_group == 1 and c_out == c_in:
            row = jnp.broadcast_to(accumulate(weight[:, 0, k]), window.shape)
            return row * window.astype(dtype)
        window = window.reshape(*batch, seq, groups, per_group)
        kernel = weight[..., k].astype(x.dtype).reshape(groups, -1, per_group)
        y = jnp.einsum("...gi,goi->...go", window, kernel, preferred_element_type=dtype)
        return y.reshape(*batch, seq, c_out)

    y = tap(0)
    for k in range(1, width):
        y = y + tap(k)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(dtype), y.shape)
    return y.astype(x.dtype)
