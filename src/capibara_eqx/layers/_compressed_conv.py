import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from ..arrays import AbstractWeight


Conv = eqx.nn.Conv | eqx.nn.ConvTranspose


class CompressedConv(eqx.Module):
    """A convolution of Equinox whose weight is kept in another form.

    `jax.lax`, which convolves, takes arrays alone: the weight is written out for each
    call. As a matrix it has a row for each output channel, `(out, in * taps)`, so that
    steps are those of a channel and groups lie along the input. `transforms.quantize`
    puts it in the place of an `equinox.nn.Conv` or `ConvTranspose`, and
    `transforms.dequantize` takes it out again.

    !!! example

        ```python
        conv = eqx.nn.Conv2d(3, 8, 3, key=key)
        matrix = conv.weight.reshape(8, -1)
        conv = CompressedConv(conv, compress(matrix, Affine(8)))
        y = conv(jnp.ones((3, 16, 16)))
        ```
    """

    conv: Conv
    matrix: AbstractWeight
    kernel_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, conv: Conv, matrix: AbstractWeight):
        """**Arguments:**

        - `conv`: the convolution; its own weight is dropped.
        - `matrix`: what stands for its weight, `(*stack, out, in * taps)`.
        """
        axes = conv.num_spatial_dims + 2
        self.kernel_shape = conv.weight.shape[-axes:]
        self.conv = eqx.tree_at(lambda conv: conv.weight, conv, None)
        self.matrix = matrix

    def restored(self) -> Conv:
        """The convolution with the weight written out."""
        stack = self.matrix.shape[:-2]
        weight = self.matrix.dense().reshape(*stack, *self.kernel_shape)
        return eqx.tree_at(
            lambda conv: conv.weight, self.conv, weight, is_leaf=lambda x: x is None
        )

    def __call__(
        self,
        x: Float[Array, "..."],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "..."]:
        """As the convolution itself."""
        return self.restored()(x, key=key)
