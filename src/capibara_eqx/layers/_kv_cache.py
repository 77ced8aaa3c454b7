import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ..internal import segment_documents, segment_positions
from ..kernels import attention
from ._cache import advance_segment, fresh_segment


class KVCache(eqx.Module):
    """Keys and values of the document that was read last, its length, its segment.

    A token lies in the slot of its position, modulo the number of slots: a cache of as
    many slots as a window has positions is a ring, in which a token takes the place
    of the one that has just left the window. Every row of a batch has a length of its
    own.
    """

    # The tokens of a head side by side, in the order in which a step reads them.
    key: Float[Array, "*batch kv_heads slots d"]
    value: Float[Array, "*batch kv_heads slots v"]
    length: Int[Array, "*batch"]
    segment: Int[Array, "*batch"]

    @property
    def slots(self) -> int:
        """Number of tokens that it can hold."""
        return self.key.shape[-2]


def new_kv_cache(
    batch_shape: tuple[int, ...], slots: int, key, value, dtype: DTypeLike
) -> KVCache:
    """A cache that has seen nothing; `key` and `value` are `(kv_heads, width)`."""
    (kv_heads, d), (_, v) = key, value
    return KVCache(
        jnp.zeros((*batch_shape, kv_heads, slots, d), dtype),
        jnp.zeros((*batch_shape, kv_heads, slots, v), dtype),
        jnp.zeros(batch_shape, jnp.int32),
        fresh_segment(batch_shape),
    )


class Chunk(eqx.Module):
    """New tokens: where each stands, and which document it is of."""

    positions: Int[Array, "*batch seq"]
    documents: Int[Array, "*batch seq"]
    segment_ids: Int[Array, "*batch seq"] | None


def place(
    shape: tuple[int, ...],
    segment_ids: Int[Array, "*batch seq"] | None,
    cache: KVCache | None,
) -> Chunk:
    """Positions and documents of new tokens, `(*batch, seq)`, behind a cache."""
    if segment_ids is None:
        positions = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        if cache is not None:
            positions = positions + cache.length[..., None]
        return Chunk(positions, jnp.zeros(shape, jnp.int32), None)
    before = offset = None
    if cache is not None:
        before = cache.segment.astype(segment_ids.dtype)
        offset = cache.length
    return Chunk(
        segment_positions(segment_ids, before, offset),
        segment_documents(segment_ids, before),
        segment_ids,
    )


def attend(
    query: Float[Array, "*batch seq heads d"],
    key: Float[Array, "*batch seq kv_heads d"],
    value: Float[Array, "*batch seq kv_heads v"],
    chunk: Chunk,
    cache: KVCache,
    **how,
) -> tuple[Float[Array, "*batch seq heads v"], KVCache]:
    """Causal attention of new tokens to the cache and to each other.

    `how` goes to `kernels.attention`. A window is a ring if the cache has as many
    slots; a cache that is no ring and too small is a runtime error.
    """
    window = how["window"]
    is_ring = window is not None and cache.slots >= window
    after = _write(key, value, chunk, cache, is_ring)
    held, documents = (after, None), chunk.documents
    if query.shape[-3] > 1 or chunk.segment_ids is not None:
        # Tokens of this chunk may overwrite what earlier ones of it see.
        held = (cache, chunk)
    keys, values, positions, segments = _visible(*held, key, value)
    out = attention(
        query,
        keys.astype(query.dtype),
        values.astype(query.dtype),
        is_causal=True,
        query_positions=chunk.positions,
        key_positions=positions,
        query_segments=documents,
        key_segments=segments,
        **how,
    )
    return out, after


def _visible(cache, chunk, key, value):
    """Keys, values, positions and documents of a cache, and of a chunk behind it."""
    slot = jnp.arange(cache.slots, dtype=jnp.int32)
    last = cache.length[..., None] - 1
    slot = jnp.broadcast_to(slot, (*cache.length.shape, cache.slots))
    # The latest position that has this slot; negative if there was none yet.
    positions = last - (last - slot) % cache.slots
    documents = jnp.where(positions >= 0, 0, -1)
    if chunk is None:
        return _by_token(cache.key), _by_token(cache.value), positions, documents
    return (
        jnp.concatenate([_by_token(cache.key), key.astype(cache.key.dtype)], -3),
        jnp.concatenate([_by_token(cache.value), value.astype(cache.value.dtype)], -3),
        jnp.concatenate([positions, chunk.positions], axis=-1),
        jnp.concatenate([documents, chunk.documents], axis=-1),
    )


def _by_token(x):
    """`(*batch, kv_heads, slots, d)` as `(*batch, slots, kv_heads, d)`, or back."""
    return jnp.moveaxis(x, -2, -3)


def _write(key, value, chunk, cache, is_ring) -> KVCache:
    """The cache after a chunk: the last document, from its first token on."""
    old_key, old_value = cache.key, cache.value
    kept, length = jnp.ones(chunk.positions.shape, bool), cache.length
    if chunk.segment_ids is None:
        length = length + chunk.positions.shape[-1]
    else:
        number = jnp.max(jnp.maximum(chunk.documents, 0), axis=-1, keepdims=True)
        kept = chunk.documents == number
        end = jnp.max(jnp.where(kept, chunk.positions + 1, 0), axis=-1)
        # A document of padding alone is the one before.
        length = jnp.where(jnp.any(kept, axis=-1), end, length)
        same = (number == 0)[..., None, None]
        old_key = jnp.where(same, old_key, jnp.zeros_like(old_key))
        old_value = jnp.where(same, old_value, jnp.zeros_like(old_value))
    if is_ring:
        kept = kept & (chunk.positions >= length[..., None] - cache.slots)
    else:
        # A number of its own is checked, not the length: inside `jax.shard_map` that
        # varies along the mesh, which Equinox's check does not take.
        length = length + eqx.error_if(
            jnp.zeros((), length.dtype),
            length > cache.slots,
            f"The attention cache is full: it holds {cache.slots} tokens. Make it "
            "with a larger `max_len`, or give the layer a `window`.",
        )
    slots = jnp.where(kept, chunk.positions % cache.slots, cache.slots)
    return KVCache(
        _scatter(old_key, slots, key),
        _scatter(old_value, slots, value),
        length,
        advance_segment(cache.segment, chunk.segment_ids),
    )


def _scatter(old, slots, new):
    """`old` with `new` at `slots`; what has no slot is left out."""

    def row(old, slots, new):
        return old.at[:, slots].set(new, mode="drop")

    for _ in range(slots.ndim - 1):
        row = eqx.filter_vmap(row)
    return row(old, slots, _by_token(new).astype(old.dtype))
