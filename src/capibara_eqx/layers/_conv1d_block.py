import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulator_dtype,
    check_choice,
    check_last_axis,
    check_segment_ids,
    check_sequence,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import causal_conv, check_implementation
from ._activation import activate, check_activation
from ._cache import advance_segment, check_cache, fresh_segment
from ._mixer import AbstractSequenceMixer
from ._norm import LayerNorm, RMSNorm


_NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Conv1DCache(eqx.Module):
    """The inputs that later outputs still see, oldest first."""

    inputs: Float[Array, "*batch reach in_channels"]
    segment: Int[Array, "*batch"]


class Conv1DBlock(AbstractSequenceMixer):
    r"""A convolution over time, a norm, an activation and a residual, each optional.

    $$y = x + \mathrm{activation}(\mathrm{norm}(W * x + b))$$

    Causal by default: the output at a token depends on that token and the
    $(K - 1) r$ before it, for kernel size $K$ and dilation $r$. A causal block has
    the whole sequence-mixer contract, packing and streaming included. With
    `causal=False` the window is centred (the same length comes out, for an even
    kernel it reaches one further back than forward), and the cache methods raise.

    !!! example

        ```python
        block = Conv1DBlock(64, 64, 4, groups=64, norm="rms", residual=True,
                            key=jax.random.key(0))
        y = block(x)                                   # (*batch, seq, 64)
        y, cache = block.prefill(x, block.init_cache((2,)))
        y_t, cache = block.step(x_t, cache)            # one token more
        ```
    """

    weight: Float[Array, "{self.out_channels} _ {self.kernel_size}"]
    bias: Float[Array, " {self.out_channels}"] | None
    norm: RMSNorm | LayerNorm | None
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    kernel_size: int = eqx.field(static=True)
    causal: bool = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    dilation: int = eqx.field(static=True)
    activation: str | None = eqx.field(static=True)
    residual: bool = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        causal: bool = True,
        groups: int = 1,
        dilation: int = 1,
        norm: str | None = None,
        activation: str | None = "silu",
        residual: bool = False,
        use_bias: bool = True,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `in_channels`, `out_channels`: sizes of the last axis before and after.
        - `kernel_size`: number of taps, in tokens.
        - `causal`: whether no output sees a later input.
        - `groups`: channels are convolved within groups; `in_channels` for a depthwise
            convolution.
        - `dilation`: distance between taps, in tokens.
        - `norm`: `"rms"`, `"layer"` or `None`.
        - `activation`: `"silu"`, `"gelu"`, `"relu"`, `"relu2"` or `None`.
        - `residual`: whether the input is added to the result.
        - `use_bias`: whether the convolution adds a bias.
        - `implementation`: passed to `kernels.causal_conv`.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, uniform in $\pm 1/\sqrt{\mathrm{fan\ in}}$.

        **Raises:**

        `ValueError` for sizes that are not positive, `groups` that do not divide the
        channels, an unknown norm, activation or implementation, a residual between
        unequal widths.
        """
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "groups": groups,
            "dilation": dilation,
        }
        for name, value in sizes.items():
            check_size(name, value)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"`groups` must divide `in_channels` and `out_channels`, got groups "
                f"{groups} for {in_channels} and {out_channels} channels."
            )
        if residual and in_channels != out_channels:
            raise ValueError(
                "`residual` adds the input to the output, so `in_channels` and "
                f"`out_channels` must be equal; got {in_channels} and {out_channels}."
            )
        if norm is not None:
            check_choice("norm", norm, _NORMS)
        if activation is not None:
            check_activation(activation)
        check_implementation(implementation, "causal_conv")
        weight_key, bias_key = jax.random.split(key)
        dtype = jnp.float32 if dtype is None else dtype
        fan_in = in_channels // groups * kernel_size
        limit = 1 / math.sqrt(fan_in)

        def uniform(key, shape):
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        shape = (out_channels, in_channels // groups, kernel_size)
        self.weight = uniform(weight_key, shape)
        self.bias = uniform(bias_key, (out_channels,)) if use_bias else None
        self.norm = None if norm is None else _NORMS[norm](out_channels, dtype=dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.causal = causal
        self.groups = groups
        self.dilation = dilation
        self.activation = activation
        self.residual = residual
        self.implementation = implementation

    @property
    def reach(self) -> int:
        """Number of inputs before the current one that an output sees."""
        return (self.kernel_size - 1) * self.dilation

    @jax.named_scope("capibara_eqx.layers.Conv1DBlock")
    def __call__(
        self,
        x: Float[Array, "*batch seq in_channels"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq out_channels"]:
        """See `AbstractSequenceMixer.__call__`.

        **Raises:**

        `ValueError` for an input that does not fit, or `segment_ids` given to a block
        that is not causal.
        """
        del key
        if self.causal:
            return self._read(x, None, segment_ids)[0]
        check_sequence("Conv1DBlock", "x", x, self.in_channels)
        if segment_ids is not None:
            raise ValueError(
                "Conv1DBlock: `segment_ids` needs `causal=True`; a centred window "
                "cannot be packed."
            )
        # The centred window is the causal one, read `ahead` tokens later.
        ahead = self.reach // 2
        padding = [(0, 0)] * (x.ndim - 2) + [(0, ahead), (0, 0)]
        y, _ = self._convolve(jnp.pad(x, padding), None, None)
        return self._finish(x, y[..., ahead:, :], None)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Conv1DCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        self._check_causal("init_cache")
        dtype = accumulator_dtype(self.weight.dtype)
        inputs = jnp.zeros((*batch_shape, self.reach, self.in_channels), dtype)
        return Conv1DCache(inputs, fresh_segment(batch_shape))

    @jax.named_scope("capibara_eqx.layers.Conv1DBlock.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq in_channels"],
        cache: Conv1DCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq out_channels"], Conv1DCache]:
        """See `AbstractSequenceMixer.prefill`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit, or if the block is not
        causal.
        """
        self._check_causal("prefill")
        check_sequence("Conv1DBlock", "x", x, self.in_channels)
        expected = eqx.filter_eval_shape(self.init_cache, x.shape[:-2])
        check_cache("Conv1DBlock", cache, expected)
        return self._read(x, cache, segment_ids)

    @jax.named_scope("capibara_eqx.layers.Conv1DBlock.step")
    def step(
        self, x: Float[Array, "*batch in_channels"], cache: Conv1DCache
    ) -> tuple[Float[Array, "*batch out_channels"], Conv1DCache]:
        """See `AbstractSequenceMixer.step`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit, or if the block is not
        causal.
        """
        self._check_causal("step")
        check_last_axis("Conv1DBlock.step", "x", x, self.in_channels)
        y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache

    @property
    def _fuses_silu(self) -> bool:
        """Whether the convolution applies the activation in the same pass."""
        return self.activation == "silu" and self.norm is None

    def _check_causal(self, method):
        if not self.causal:
            raise ValueError(
                f"Conv1DBlock: `{method}` needs `causal=True`; a centred window cannot "
                "be streamed."
            )

    def _read(self, x, cache, segment_ids):
        check_sequence("Conv1DBlock", "x", x, self.in_channels)
        check_segment_ids("Conv1DBlock", segment_ids, x.shape[:-1])
        if cache is None:
            inputs, segment = None, fresh_segment(x.shape[:-2])
        else:
            inputs, segment = cache.inputs, cache.segment
            if segment_ids is not None:
                # What the cache holds is of no use to another document.
                other = _starts_elsewhere(segment_ids, segment)
                inputs = jnp.where(
                    other[..., None, None], jnp.zeros_like(inputs), inputs
                )
        y, inputs = self._convolve(x, inputs, segment_ids)
        y = self._finish(x, y, segment_ids)
        inputs = inputs.astype(accumulator_dtype(self.weight.dtype))
        return y, Conv1DCache(inputs, advance_segment(segment, segment_ids))

    def _convolve(self, x, inputs, segment_ids):
        return causal_conv(
            x,
            self.weight,
            self.bias,
            activation="silu" if self._fuses_silu else None,
            dilation=self.dilation,
            groups=self.groups,
            initial_state=inputs,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _finish(self, x, y, segment_ids):
        if self.norm is not None:
            y = self.norm(y)
        if self.activation is not None and not self._fuses_silu:
            y = activate(self.activation, y)
        if self.residual:
            y = x + y
        return zero_padding(y, segment_ids)


def _starts_elsewhere(
    segment_ids: Int[Array, "*batch seq"], before: Int[Array, "*batch"]
) -> Array:
    """Whether the first valid token is of another document than `before`."""
    valid = segment_ids >= 0
    first = jnp.argmax(valid, axis=-1)[..., None]
    starts = segment_starts(segment_ids, before.astype(segment_ids.dtype))
    return jnp.take_along_axis(starts, first, axis=-1)[..., 0]
