import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import accumulate, accumulator_dtype, silu
from .._closure import spread
from ._operands import Operands, pack


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
    """`kernels.causal_conv` as a sum over taps of shifted inputs.

    One multiply-add a tap that XLA fuses into one pass for a depthwise convolution,
    one matmul a tap otherwise. The general convolution of XLA is many times slower on
    CPU when every channel is its own group.
    """
    with_silu = activation == "silu"
    if groups == x.shape[-1] == weight.shape[0]:
        operands = pack(x, weight, bias, history, document)
        return convolve_rows(operands, dilation, with_silu).reshape(x.shape)
    y = _convolve_groups(x, weight, dilation, groups, history, document)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    return (silu(y) if with_silu else y).astype(x.dtype)


def convolve_rows(
    operands: Operands, dilation: int, with_silu: bool
) -> Float[Array, "rows seq channels"]:
    """The convolution of every channel by itself."""
    x, weight, bias, history, document = operands
    rows, dtype = x.shape[0], accumulator_dtype(x.dtype)
    weight = spread(accumulate(weight), rows)

    def tap(k, window):
        row = jnp.broadcast_to(weight[:, None, :, k], window.shape)
        return row * window.astype(dtype)

    y = _sum_of_taps(tap, weight.shape[-1], x, dilation, history, document)
    if bias is not None:
        row = spread(bias.astype(dtype), rows)[:, None]
        y = y + jnp.broadcast_to(row, y.shape)
    return (silu(y) if with_silu else y).astype(x.dtype)


def _convolve_groups(x, weight, dilation, groups, history, document):
    c_out, per_group, width = weight.shape
    dtype = accumulator_dtype(x.dtype)

    def tap(k, window):
        window = window.reshape(*x.shape[:-1], groups, per_group)
        kernel = weight[..., k].astype(x.dtype).reshape(groups, -1, per_group)
        y = jnp.einsum("...gi,goi->...go", window, kernel, preferred_element_type=dtype)
        return y.reshape(*x.shape[:-1], c_out)

    return _sum_of_taps(tap, width, x, dilation, history, document)


def _sum_of_taps(tap, width, x, dilation, history, document):
    seq, reach = x.shape[-2], history.shape[-2]
    inputs = jnp.concatenate([history.astype(x.dtype), x], axis=-2)

    def window(k):
        start = reach - dilation * (width - 1 - k)
        window = inputs[..., start : start + seq, :]
        if document is None:
            return window
        same = document[..., start : start + seq] == document[..., reach:]
        return jnp.where(same[..., None], window, jnp.zeros_like(window))

    y = tap(0, window(0))
    for k in range(1, width):
        y = y + tap(k, window(k))
    return y
