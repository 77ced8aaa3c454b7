import abc

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..internal import (
    check_last_axis,
    check_segment_ids,
    check_sequence,
    check_size,
    zero_padding,
)
from ..kernels import attention
from ._attention_mode import AttentionMode
from ._bitnet import BitNet158
from ._cache import check_cache
from ._dropout import Dropout
from ._kv_cache import KVCache, attend, new_kv_cache, place
from ._linear import Linear
from ._mixer import AbstractSequenceMixer


Heads = Float[Array, "*batch seq heads width"]


class AbstractAttention(AbstractSequenceMixer):
    """A sequence mixer that is attention between the heads of its subclass.

    A subclass gives queries, keys and values; how they see each other, the cache and
    the output are here.

    !!! example

        ```python
        layer = Attention(64, 8, n_kv_heads=2, key=jax.random.key(0))
        isinstance(layer, AbstractAttention), layer.mode, layer.cache_elements
        ```
    """

    o_proj: eqx.AbstractVar[Linear | BitNet158]
    dropout: eqx.AbstractVar[Dropout]
    d_model: eqx.AbstractVar[int]
    n_heads: eqx.AbstractVar[int]
    is_causal: eqx.AbstractVar[bool]
    window: eqx.AbstractVar[int | None]
    implementation: eqx.AbstractVar[str | None]

    @property
    @abc.abstractmethod
    def mode(self) -> AttentionMode:
        """Which of the three kinds this is."""

    @abc.abstractmethod
    def heads(
        self,
        x: Float[Array, "*batch seq d_model"],
        positions: Int[Array, "*batch seq"],
    ) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values of tokens at `positions`, scaled and turned."""

    @property
    @abc.abstractmethod
    def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """`(kv_heads, width)` of a token's keys and of its values in a cache."""

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """Factor on the products of queries and keys."""

    @property
    def cache_elements(self) -> int:
        """Numbers that a cache holds of one token: keys and values."""
        (kv_heads, key), (_, value) = self.cached_shapes
        return kv_heads * (key + value)

    @jax.named_scope("capibara_eqx.layers.Attention")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`; `key` is for dropout.

        **Raises:**

        `ValueError` for an input that does not fit, or active dropout without a key.
        """
        name = type(self).__name__
        check_sequence(name, "x", x, self.d_model)
        check_segment_ids(name, segment_ids, x.shape[:-1])
        x = zero_padding(x, segment_ids)
        chunk = place(x.shape[:-1], segment_ids, None)
        documents = None if segment_ids is None else chunk.documents
        y = attention(
            *self.heads(x, chunk.positions),
            is_causal=self.is_causal,
            query_positions=chunk.positions,
            key_positions=chunk.positions,
            query_segments=documents,
            key_segments=documents,
            **self._how(),
            **dropping(name, self.dropout, key),
        )
        return self._out(y, segment_ids)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> KVCache:
        """See `AbstractSequenceMixer.init_cache`.

        **Arguments:**

        - `batch_shape`: batch axes of what will be read.
        - `max_len`: tokens of the longest document; a layer with a `window` holds no
            more than that, and needs no `max_len`.

        **Raises:**

        `ValueError` if neither bounds the cache, or for a layer that is not causal.
        """
        name = type(self).__name__
        if not self.is_causal:
            raise ValueError(
                f"{name}: it is not causal, so that later tokens change earlier "
                "outputs and there is nothing to cache. Build it with `is_causal=True`."
            )
        if max_len is None and self.window is None:
            raise ValueError(
                f"{name}: `max_len` is needed: the number of tokens that the cache "
                "must hold. Pass it to `init_cache`, or build the layer with `window`."
            )
        if max_len is not None:
            check_size("max_len", max_len)
        bounds = [n for n in (max_len, self.window) if n is not None]
        dtype = self.o_proj.weight.dtype
        return new_kv_cache(batch_shape, min(bounds), *self.cached_shapes, dtype)

    @jax.named_scope("capibara_eqx.layers.Attention.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: KVCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], KVCache]:
        """See `AbstractSequenceMixer.prefill`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit; a runtime error if the
        cache is full and is not that of a window.
        """
        name = type(self).__name__
        check_sequence(name, "x", x, self.d_model)
        check_segment_ids(name, segment_ids, x.shape[:-1])
        slots = cache.slots if isinstance(cache, KVCache) else 1
        fresh = eqx.filter_eval_shape(self.init_cache, x.shape[:-2], max_len=slots)
        check_cache(name, cache, fresh)
        x = zero_padding(x, segment_ids)
        chunk = place(x.shape[:-1], segment_ids, cache)
        heads = self.heads(x, chunk.positions)
        y, cache = attend(*heads, chunk, cache, **self._how())
        return self._out(y, segment_ids), cache

    @jax.named_scope("capibara_eqx.layers.Attention.step")
    def step(
        self, x: Float[Array, "*batch d_model"], cache: KVCache
    ) -> tuple[Float[Array, "*batch d_model"], KVCache]:
        """See `AbstractSequenceMixer.step`; there is no dropout.

        **Raises:**

        As `prefill`.
        """
        check_last_axis(f"{type(self).__name__}.step", "x", x, self.d_model)
        y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache

    def _how(self):
        return {
            "window": self.window,
            "scale": self.scale,
            "implementation": self.implementation,
        }

    def _out(self, y, segment_ids):
        return zero_padding(self.o_proj(joined(y)), segment_ids)


def split_heads(x: Float[Array, "*batch d"], heads: int) -> Float[Array, "..."]:
    """The last axis as `(heads, d / heads)`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def joined(y: Float[Array, "*batch heads width"]) -> Float[Array, "*batch d"]:
    """The heads side by side."""
    return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])


def dropping(layer: str, dropout: Dropout, key: PRNGKeyArray | None) -> dict:
    """What `kernels.attention` takes for `dropout`, nothing where it is off."""
    if dropout.inference or (isinstance(dropout.p, int | float) and dropout.p == 0):
        return {}
    if key is None:
        raise ValueError(
            f"{layer}: `key` is needed while dropout is active. Pass `key=...`, or "
            "turn it off with `eqx.nn.inference_mode(model)`."
        )
    return {"dropout_p": dropout.p, "dropout_key": key}


def check_heads(n_heads: int, n_kv_heads: int | None, widths: dict[str, int]) -> int:
    """The number of key and value heads; `ValueError` unless all can be divided."""
    check_size("n_heads", n_heads)
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    check_size("n_kv_heads", n_kv_heads)
    if n_heads % n_kv_heads != 0:
        raise ValueError(
            "`n_kv_heads` must divide `n_heads`, since each serves equally many heads; "
            f"got n_heads={n_heads} and n_kv_heads={n_kv_heads}."
        )
    for name, width in widths.items():
        check_size(name, width)
        if width % n_heads != 0:
            raise ValueError(
                f"`{name}` must be a multiple of `n_heads`, got {name}={width} and "
                f"n_heads={n_heads}. Change either."
            )
    return n_kv_heads
