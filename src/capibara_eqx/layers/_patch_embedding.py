import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import accumulate, check_choice, check_size
from ._linear import Linear
from ._positions import LearnedPositions, sinusoidal_positions


class PatchEmbedding(eqx.Module):
    r"""An image to a sequence: one vector for each patch of it.

    $$y_p = W\, \mathrm{vec}(\mathrm{patch}_p) + b + P[p]$$

    Dosovitskiy et al., *An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale*, arXiv 2010.11929. Patches do not overlap and follow row by
    row; a patch is read channel by channel, row by row, so that `proj.weight` is the
    kernel of a convolution whose stride is the patch,
    `(d_model, in_channels, height, width)`, with the last three axes as one.

    With `class_token=True` a learned vector stands in front of the patches, at
    position 0. `weight_decay_mask` leaves it and the learned positions alone.

    !!! example

        ```python
        embed = PatchEmbedding(32, 8, 64, class_token=True, key=jax.random.key(0))
        y = embed(jnp.ones((2, 3, 32, 32)))            # (*batch, 1 + 16, 64)
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"class_token"})

    proj: Linear
    class_token: Float[Array, " {self.d_model}"] | None
    learned: LearnedPositions | None
    image_size: tuple[int, int] = eqx.field(static=True)
    patch_size: tuple[int, int] = eqx.field(static=True)
    d_model: int = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    positions: str = eqx.field(static=True)

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        d_model: int,
        in_channels: int = 3,
        class_token: bool = False,
        positions: str = "none",
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `image_size`: height and width of the images in pixels; one number for both.
        - `patch_size`: height and width of a patch; they divide those of the image.
        - `d_model`: length of each vector.
        - `in_channels`: channels of the images.
        - `class_token`: whether a learned vector, at first zero, stands in front.
        - `positions`: what is added for the place in the sequence: `"none"`,
            `"learned"` or `"sinusoidal"` (`sinusoidal_positions`).
        - `use_bias`: whether the map of the patches has a bias.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values; those of the map are uniform in
            $\pm 1/\sqrt{\mathrm{fan\ in}}$.

        **Raises:**

        `ValueError` for sizes that are not positive, a patch that does not divide the
        image, or unknown `positions`.
        """
        self.image_size = _height_and_width("image_size", image_size)
        self.patch_size = _height_and_width("patch_size", patch_size)
        check_size("d_model", d_model)
        check_size("in_channels", in_channels)
        check_choice("positions", positions, ("none", "learned", "sinusoidal"))
        if any(i % p for i, p in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                "`patch_size` must divide `image_size` in height and width, got "
                f"patches of {self.patch_size} in images of {self.image_size}. Resize "
                "or pad the images."
            )
        proj_key, learned_key = jax.random.split(key)
        fan_in = in_channels * math.prod(self.patch_size)
        self.d_model = d_model
        self.in_channels = in_channels
        self.positions = positions
        self.proj = Linear(fan_in, d_model, use_bias, dtype, key=proj_key)
        self.class_token = (
            jnp.zeros((d_model,), self.proj.weight.dtype) if class_token else None
        )
        self.learned = (
            LearnedPositions(self.length, d_model, dtype, key=learned_key)
            if positions == "learned"
            else None
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (rows, columns) = self.image_size, self.patch_size
        return height // rows, width // columns

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Length of the sequence: the patches and the class token."""
        return self.num_patches + (self.class_token is not None)

    @jax.named_scope("capibara_eqx.layers.PatchEmbedding")
    def __call__(
        self,
        images: Float[Array, "*batch channels height width"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch {self.length} {self.d_model}"]:
        """**Arguments:**

        - `images`: `(*batch, in_channels, height, width)`.
        - `key`: ignored.

        **Returns:**

        `(*batch, patches, d_model)`, one longer with a class token, in the dtype of
        `images`.

        **Raises:**

        `ValueError` for images of another size, or that are not of floats.
        """
        del key
        self._check_images(images)
        y = self.proj(self._patches(images))
        if self.class_token is not None:
            shape = (*y.shape[:-2], 1, self.d_model)
            token = jnp.broadcast_to(self.class_token.astype(y.dtype), shape)
            y = jnp.concatenate([token, y], axis=-2)
        wide = accumulate(y)
        if self.learned is not None:
            place = self.learned.weight.astype(wide.dtype)
        elif self.positions == "sinusoidal":
            place = jnp.arange(self.length)
            place = sinusoidal_positions(place, self.d_model, dtype=wide.dtype)
        else:
            return y
        return (wide + jnp.broadcast_to(place, wide.shape)).astype(y.dtype)

    def _patches(self, images):
        """`(*batch, patches, in_channels * patch)`: unfolded, one patch a row."""
        (rows, columns), (height, width) = self.grid, self.patch_size
        *batch, channels, _, _ = images.shape
        x = images.reshape(*batch, channels, rows, height, columns, width)
        n = len(batch)
        # channels rows height columns width -> rows columns channels height width
        axes = [n + 1, n + 3, n, n + 2, n + 4]
        x = jnp.transpose(x, [*range(n), *axes])
        return x.reshape(*batch, rows * columns, channels * height * width)

    def _check_images(self, images):
        expected = (self.in_channels, *self.image_size)
        if images.shape[-3:] != expected:
            raise ValueError(
                "PatchEmbedding: `images` must be (*batch, channels, height, width) "
                f"with the last three {expected}, got shape {images.shape}. Resize "
                "them, or move the channels in front of height and width."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"PatchEmbedding: `images` must be of floats, got {images.dtype}. "
                "Scale them first, as in `images.astype(jnp.float32) / 255`."
            )


def _height_and_width(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2:
        raise ValueError(
            f"`{name}` must be one number or (height, width), got {size!r}."
        )
    for value in pair:
        check_size(name, value)
    return pair[0], pair[1]
