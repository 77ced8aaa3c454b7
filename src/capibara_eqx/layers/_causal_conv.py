import jax
from jaxtyping import Array, Float

from .. import kernels
from ..internal import check_sequence


@jax.named_scope("capibara_eqx.layers.causal_conv")
def causal_conv(
    x: Float[Array, "*batch seq d"], conv_kernel: Float[Array, "d width"]
) -> Float[Array, "*batch seq d"]:
    r"""A causal convolution of each channel, and SiLU.

    $$y_t = \mathrm{silu}\Big(\sum_{k=0}^{K-1} w_k\, x_{t - (K-1-k)}\Big)$$

    with width $K$: the last tap sees the current token, none sees a later one, and
    what lies before the first token is zero. It is what `LinearSSM` and `Mamba` have
    in front; `kernels.causal_conv` has biases, dilation, states and packing as well,
    `Conv1DBlock` is the layer.

    **Arguments:**

    - `x`: `(*batch, seq, d)`.
    - `conv_kernel`: the taps of each channel, oldest first, `(d, width)`.

    **Returns:**

    The shape and dtype of `x`.

    **Raises:**

    `ValueError` unless the kernel has one row a channel.

    !!! example

        ```python
        taps = jnp.zeros((64, 4)).at[:, -1].set(1.0)
        y = causal_conv(x, taps)                       # silu(x)
        ```
    """
    if conv_kernel.ndim != 2 or 0 in conv_kernel.shape:
        raise ValueError(
            "causal_conv: `conv_kernel` must have one row of taps a channel, "
            f"(d, width >= 1), got shape {conv_kernel.shape}."
        )
    d = conv_kernel.shape[0]
    check_sequence("causal_conv", "x", x, d)
    return kernels.causal_conv(x, conv_kernel[:, None], activation="silu", groups=d)[0]
