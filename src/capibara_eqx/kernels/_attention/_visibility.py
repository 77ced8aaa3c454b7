from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visibility(eqx.Module):
    """Which key every query sees: all conditions that are there, at once.

    Batch axes of positions and segments are those of the queries or of size one; the
    mask has a heads axis behind them, and each of its axes may be of size one.
    """

    query_positions: Int[Array, "*#batch query"]
    key_positions: Int[Array, "*#batch key"]
    query_segments: Int[Array, "*#batch query"] | None
    key_segments: Int[Array, "*#batch key"] | None
    mask: Bool[Array, "*#batch #heads #query #key"] | None
    is_causal: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)

    @property
    def is_total(self) -> bool:
        """Whether every query sees every key, as far as is known without values."""
        ordered = self.is_causal or self.window is not None
        return not ordered and self.mask is None and self.query_segments is None

    def pairs(self) -> Bool[Array, "..."] | None:
        """The conditions on every pair, `None` if there are none.

        `(*batch, heads, query, key)`, any of them of size one.
        """
        found = []
        if self.is_causal or self.window is not None:
            ahead = _difference(self.query_positions, self.key_positions)
            if self.is_causal:
                found.append(ahead >= 0)
            if self.window is not None:
                found.append(jnp.abs(ahead) < self.window)
        if self.query_segments is not None:
            same = _difference(self.query_segments, self.key_segments) == 0
            found.append(same & (self.query_segments >= 0)[..., :, None])
        visible = None if self.mask is None else self.mask
        for condition in found:
            condition = condition[..., None, :, :]
            visible = condition if visible is None else visible & condition
        return visible

    def possible(self) -> Bool[Array, ""] | None:
        """Whether any pair may be seen, by ranges: cheaper than all pairs.

        `None` if there is no condition. False only where nothing is seen; a mask is not
        looked at.
        """
        found = []
        q_at, k_at = self.query_positions, self.key_positions
        if self.is_causal:
            found.append(jnp.min(k_at, axis=-1) <= jnp.max(q_at, axis=-1))
        if self.window is not None:
            near = jnp.min(q_at, axis=-1) - jnp.max(k_at, axis=-1) < self.window
            found.append(near)
            if not self.is_causal:
                ahead = jnp.min(k_at, axis=-1) - jnp.max(q_at, axis=-1)
                found.append(ahead < self.window)
        if self.query_segments is not None and self.key_segments is not None:
            q_of, k_of = self.query_segments, self.key_segments
            found.append(_lowest(k_of) <= jnp.max(q_of, axis=-1))
            found.append(_lowest(q_of) <= jnp.max(k_of, axis=-1))
        if not found:
            return None
        every = found[0]
        for condition in found[1:]:
            every = every & condition
        return jnp.any(every)

    def padded(self, query: int, key: int) -> "Visibility":
        """For so many more queries and keys, which see nothing and are not seen."""
        if query == 0 and key == 0:
            return self
        queries, keys = self.query_segments, self.key_segments
        if queries is None:
            queries = jnp.zeros_like(self.query_positions)
            keys = jnp.zeros_like(self.key_positions)
        return Visibility(
            _pad(self.query_positions, -1, query, 0),
            _pad(self.key_positions, -1, key, 0),
            _pad(queries, -1, query, -1),
            _pad(keys, -1, key, -1),
            _pad(_pad(self.mask, -2, query, False), -1, key, False),
            self.is_causal,
            self.window,
        )

    def block(self, query: Array, key: Array, sizes: tuple[int, int]) -> "Visibility":
        """Of the queries and keys from `query` and `key` on, `sizes` many."""
        return Visibility(
            _slice(self.query_positions, -1, query, sizes[0]),
            _slice(self.key_positions, -1, key, sizes[1]),
            _slice(self.query_segments, -1, query, sizes[0]),
            _slice(self.key_segments, -1, key, sizes[1]),
            _slice(_slice(self.mask, -2, query, sizes[0]), -1, key, sizes[1]),
            self.is_causal,
            self.window,
        )


def _lowest(segments):
    """The lowest that is not padding; more than any if there is none."""
    most = jnp.iinfo(segments.dtype).max
    return jnp.min(jnp.where(segments >= 0, segments, most), axis=-1)


def _difference(query, key):
    return query[..., :, None] - key[..., None, :]


def _pad(x: Any, axis: int, count: int, value: Any) -> Any:
    if x is None or (x.shape[axis] == 1 and x.ndim > 2 and x.dtype == bool):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, constant_values=value)


def _slice(x: Any, axis: int, start: Array, size: int) -> Any:
    if x is None or x.shape[axis] == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def grouped(
    visible: Bool[Array, "*batch heads query key"], n_kv_heads: int
) -> Bool[Array, "*batch kv_heads group query key"]:
    """The heads axis as two: key heads, and the query heads that share each."""
    *batch, heads, query, key = visible.shape
    shape = (1, 1) if heads == 1 else (n_kv_heads, heads // n_kv_heads)
    return visible.reshape(*batch, *shape, query, key)
