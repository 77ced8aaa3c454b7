from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    check_choice,
    check_last_axis,
    check_probability,
    check_segment_ids,
    check_sequence,
    check_size,
    split_or_none,
    zero_padding,
)
from ._compute_dtype import cast_for_compute
from ._dropout import Dropout, has_active_dropout
from ._glu import SwiGLU
from ._hybrid_ssm import HybridSSM
from ._mixer import AbstractSequenceMixer, check_mixed, check_mixer
from ._norm import RMSNorm


_COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")


class UltraSSM(AbstractSequenceMixer):
    r"""A pre-norm residual around a sequence mixer that saves time and memory.

    $$h = x + \mathrm{dropout}(\mathrm{mixer}(\mathrm{norm}(x))), \quad
    y = h + \mathrm{dropout}(\mathrm{swiglu}(\mathrm{norm}(h)))$$

    the second with `d_ff` only. Xiong et al., *On Layer Normalization in the
    Transformer Architecture*, arXiv 2002.04745; Shazeer, *GLU Variants Improve
    Transformer*, arXiv 2002.05202.

    - Mixer and feed-forward compute in `compute_dtype`: matrices are cast to it,
      biases, norms and decay rates are not, see `cast_for_compute`. The residual
      stream keeps the dtype of `x`, a recurrent state is float32 or wider
      (Micikevicius et al., *Mixed Precision Training*, arXiv 1710.03740).
    - `remat` keeps the inputs alone for the backward pass, which computes the rest
      again (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, arXiv
      1604.06174).
    - `chunk_size` reads a row so many tokens at a time and carries the cache: the
      values are those of the whole row, what is live at once is that of one chunk.
      Under derivatives so with `remat`, which then keeps the inputs and the cache of
      each chunk.

    It streams as its mixer does and has its cache. Padding keeps its residual stream:
    the output there is the input.

    !!! example

        ```python
        k1, k2 = jax.random.split(key)
        layer = UltraSSM(
            Mamba(64, key=k1), 64, d_ff=176, remat=True, chunk_size=256, key=k2
        )
        y = layer(x)                                   # (*batch, seq, 64), as x
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    mixer_norm: RMSNorm
    mixer: AbstractSequenceMixer
    feed_forward_norm: RMSNorm | None
    feed_forward: SwiGLU | None
    dropout: Dropout
    d_model: int = eqx.field(static=True)
    compute_dtype: str | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        mixer: AbstractSequenceMixer,
        d_model: int,
        d_ff: int | None = None,
        dropout_rate: float = 0.0,
        compute_dtype: DTypeLike | None = "bfloat16",
        remat: bool = False,
        chunk_size: int | None = None,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `mixer`: from `d_model` to `d_model`, returning its output alone.
        - `d_model`: width of the residual stream.
        - `d_ff`: width inside the feed-forward; there is none if not given.
        - `dropout_rate`: probability of dropping an element of either output. There is
            dropout in `__call__` only.
        - `compute_dtype`: in which mixer and feed-forward compute: bfloat16, float16,
            float32 or float64; `None` is the dtype of the input and leaves the
            parameters as they are.
        - `remat`: whether the backward pass computes everything but the inputs again.
        - `chunk_size`: tokens that are read at once; all if not given. Chunks are read
            by the mixer's `prefill`, which drops nothing: a mixer with dropout of its
            own is refused by `__call__` while that is active, whatever the length.
        - `eps`: of the norms.
        - `dtype`: of the parameters made here; float32 if not given.
        - `key`: for their initial values.

        **Raises:**

        `ValueError` for a size that is not positive, a `dropout_rate` outside [0, 1],
        another `compute_dtype`, or a `mixer` that is none of this width.
        """
        check_probability("dropout_rate", dropout_rate)
        if chunk_size is not None:
            check_size("chunk_size", chunk_size)
        if compute_dtype is not None:
            compute_dtype = _dtype_name("compute_dtype", compute_dtype)
        self.mixer_norm = RMSNorm(d_model, eps, dtype=dtype)
        check_mixer("UltraSSM", "mixer", mixer, d_model)
        self.mixer = mixer
        self.feed_forward_norm = None
        self.feed_forward = None
        if d_ff is not None:
            self.feed_forward_norm = RMSNorm(d_model, eps, dtype=dtype)
            self.feed_forward = SwiGLU(d_model, d_ff, dtype=dtype, key=key)
        self.dropout = Dropout(dropout_rate)
        self.d_model = d_model
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.chunk_size = chunk_size

    @jax.named_scope("capibara_eqx.layers.UltraSSM")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`.

        **Arguments:**

        - `x`, `segment_ids`: as there; where an id is negative, the output is `x`.
        - `key`: for dropout, and for mixers that draw random numbers; each chunk draws
            its own.

        **Raises:**

        `ValueError` for an input that does not fit, active dropout without a key or,
        beside `chunk_size`, in the mixer, packed rows for a mixer that switches by
        their length, or one that returns something else than its output.
        """
        self._check(x, segment_ids)
        self._check_mixer_can_call(segment_ids)
        layer = self._narrow()
        if self._fits_at_once(x):
            return self._read(layer, "__call__", x, None, segment_ids, key)[0]
        cache = layer.mixer.init_cache(x.shape[:-2], max_len=x.shape[-2])
        return self._in_chunks(layer, x, cache, segment_ids, key)[0]

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Any:
        """The mixer's cache, see `AbstractSequenceMixer.init_cache`."""
        return self._narrow().mixer.init_cache(batch_shape, max_len=max_len)

    @jax.named_scope("capibara_eqx.layers.UltraSSM.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Any,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], Any]:
        """See `AbstractSequenceMixer.prefill`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        self._check(x, segment_ids)
        layer = self._narrow(dropout=False)
        if self._fits_at_once(x):
            return self._read(layer, "prefill", x, cache, segment_ids, None)
        return self._in_chunks(layer, x, cache, segment_ids, None)

    @jax.named_scope("capibara_eqx.layers.UltraSSM.step")
    def step(
        self, x: Float[Array, "*batch d_model"], cache: Any
    ) -> tuple[Float[Array, "*batch d_model"], Any]:
        """See `AbstractSequenceMixer.step`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_last_axis("UltraSSM.step", "x", x, self.d_model)
        return self._read(self._narrow(dropout=False), "step", x, cache, None, None)

    def _check(self, x, segment_ids):
        check_sequence("UltraSSM", "x", x, self.d_model)
        check_segment_ids("UltraSSM", segment_ids, x.shape[:-1])

    def _check_mixer_can_call(self, segment_ids):
        """In chunks it is not called: they refuse alike, so that lengths agree."""
        if self.chunk_size is not None and has_active_dropout(self.mixer):
            raise ValueError(
                "UltraSSM: `mixer` has dropout of its own, which `chunk_size` would "
                "leave out: chunks are read by its `prefill`. Pass `dropout_rate` to "
                "UltraSSM instead, leave out `chunk_size`, or turn it off with "
                "`eqx.nn.inference_mode(model)`."
            )
        if segment_ids is not None and _switches(self.mixer):
            raise ValueError(
                "UltraSSM: `mixer` has a HybridSSM that switches by the length of a "
                "row, but a row with `segment_ids` holds documents of other lengths, "
                'or padding. Build the HybridSSM with `mode="mix"`, or with one branch.'
            )

    def _fits_at_once(self, x) -> bool:
        return self.chunk_size is None or x.shape[-2] <= self.chunk_size

    def _narrow(self, dropout: bool = True) -> "UltraSSM":
        """The layer to compute with: cast once, outside of the loop over chunks."""
        layer = self
        if self.compute_dtype is not None:
            layer = cast_for_compute(layer, self.compute_dtype)
        if not dropout:
            layer = eqx.tree_at(lambda m: m.dropout, layer, Dropout(0.0))
        return layer

    def _read(self, *args):
        return (eqx.filter_checkpoint(_read) if self.remat else _read)(*args)

    def _in_chunks(self, layer, x, cache, segment_ids, key):
        count = x.shape[-2] // self.chunk_size
        end = count * self.chunk_size
        keys = None if key is None else jax.random.split(key, count + 1)

        def body(cache, chunk):
            x, segment_ids, key = chunk
            y, cache = self._read(layer, "prefill", x, cache, segment_ids, key)
            return cache, y

        def cut(array, axis):
            whole = jax.lax.slice_in_dim(array, 0, end, axis=axis)
            shape = list(array.shape)
            shape[axis : axis + 1] = count, self.chunk_size
            return jnp.moveaxis(whole.reshape(shape), axis, 0)

        axis = x.ndim - 2
        ids = None if segment_ids is None else cut(segment_ids, axis)
        first_keys = None if keys is None else keys[:count]
        cache, y = jax.lax.scan(body, cache, (cut(x, axis), ids, first_keys))
        y = jnp.moveaxis(y, 0, axis).reshape(*x.shape[:-2], end, self.d_model)
        if end == x.shape[-2]:
            return y, cache
        ids = None if segment_ids is None else segment_ids[..., end:]
        last_key = None if keys is None else keys[count]
        rest = (x[..., end:, :], cache, ids, last_key)
        rest, cache = self._read(layer, "prefill", *rest)
        return jnp.concatenate([y, rest], axis=axis), cache


def _read(layer, method, x, cache, segment_ids, key):
    """Tokens through both residuals, by a method of the mixer; also the new cache."""
    mixer_key, *dropout_keys = split_or_none(key, 3)
    seen = _normed(layer, layer.mixer_norm, x, segment_ids)
    if method == "step":
        y, cache = layer.mixer.step(seen, cache)
    elif method == "prefill":
        y, cache = layer.mixer.prefill(seen, cache, segment_ids=segment_ids)
    else:
        y = layer.mixer(seen, segment_ids=segment_ids, key=mixer_key)
    y = check_mixed("UltraSSM", "mixer", x, y).astype(x.dtype)
    x = x + layer.dropout(y, key=dropout_keys[0])
    if layer.feed_forward is not None:
        # Without biases it leaves padding zero.
        y = layer.feed_forward(_normed(layer, layer.feed_forward_norm, x, segment_ids))
        x = x + layer.dropout(y.astype(x.dtype), key=dropout_keys[1])
    return x, cache


def _normed(layer, norm, x, segment_ids):
    if segment_ids is not None:
        x = zero_padding(x, segment_ids)
    return norm(x).astype(layer.compute_dtype or x.dtype)


def _switches(mixer: AbstractSequenceMixer | None) -> bool:
    """Whether it is, or hands whole rows to, a hybrid that chooses by their length."""
    if isinstance(mixer, UltraSSM):
        return _switches(mixer.mixer)
    if isinstance(mixer, HybridSSM):
        branches = (mixer.ssm, mixer.attention)
        return mixer.has_choice or any(_switches(branch) for branch in branches)
    return False


def _dtype_name(argument: str, dtype: DTypeLike) -> str:
    """The name of a dtype to compute in; `ValueError` if it is none."""
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(
            f"`{argument}` must be a dtype, got {dtype!r}. Did you mean 'bfloat16'?"
        ) from error
    check_choice(argument, found.name, _COMPUTE_DTYPES)
    return found.name
