import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def zero_padding(
    x: Shaped[Array, "*batch seq d"], segment_ids: Int[Array, "*batch seq"] | None
) -> Shaped[Array, "*batch seq d"]:
    """`x` with zeros where `segment_ids` are negative.

    On the way in as well as out: what stands at padding may be NaN, which times a
    gradient of zero is NaN again.
    """
    if segment_ids is None:
        return x
    return jnp.where(segment_ids[..., None] >= 0, x, jnp.zeros_like(x))


def previous_segment(
    segment_ids: Int[Array, "*batch seq"], before: Int[Array, "*batch"]
) -> Int[Array, "*batch seq"]:
    """Segment of the last valid token before each position.

    **Arguments:**

    - `segment_ids`: document of each token; negative ids are padding.
    - `before`: segment of the last valid token before the first position, negative
        if there was none.

    **Returns:**

    The id of the nearest earlier token that is not padding, `before` where there is
    none.
    """
    seq = segment_ids.shape[-1]
    position = jnp.arange(seq, dtype=jnp.int32)
    position = jnp.broadcast_to(position, segment_ids.shape)
    axis = segment_ids.ndim - 1
    latest = jax.lax.cummax(jnp.where(segment_ids >= 0, position, -1), axis=axis)
    start = jnp.full_like(latest[..., :1], -1)
    latest = jnp.concatenate([start, latest[..., :-1]], axis=-1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(latest, 0), axis=-1)
    return jnp.where(latest >= 0, ids, before[..., None])


def segment_starts(
    segment_ids: Int[Array, "*batch seq"], before: Int[Array, "*batch"] | None = None
) -> Bool[Array, "*batch seq"]:
    """Where a new document begins: the id differs from the last valid token's.

    The first valid token starts a document only if `before`, the segment that a
    cache ended in, is another one (negative: nothing came before, no start), so that
    an initial state reaches the first document.
    """
    if before is None:
        before = jnp.full(segment_ids.shape[:-1], -1, segment_ids.dtype)
    previous = previous_segment(segment_ids, before)
    return (segment_ids >= 0) & (previous >= 0) & (segment_ids != previous)


def last_segment(
    segment_ids: Int[Array, "*batch seq"], before: Int[Array, "*batch"]
) -> Int[Array, "*batch"]:
    """Segment of the last valid token, `before` if all tokens are padding."""
    none = jnp.full_like(segment_ids[..., :1], -1)
    return previous_segment(jnp.concatenate([segment_ids, none], -1), before)[..., -1]


def segment_positions(
    segment_ids: Int[Array, "*batch seq"],
    before: Int[Array, "*batch"] | None = None,
    offset: Int[Array, "*batch"] | None = None,
) -> Int[Array, "*batch seq"]:
    """Position of each token within its document, padding not counted.

    **Arguments:**

    - `segment_ids`: document of each token; negative ids are padding.
    - `before`: segment that a cache ended in, negative if it had seen nothing.
    - `offset`: number of tokens of that document in the cache.

    **Returns:**

    int32; that of padding means nothing, but is not negative.
    """
    index = jnp.cumsum(segment_ids >= 0, axis=-1, dtype=jnp.int32) - 1
    starts = segment_starts(segment_ids, before)
    axis = segment_ids.ndim - 1
    first = jax.lax.cummax(jnp.where(starts, index, -1), axis=axis)
    continued = index if offset is None else index + offset[..., None]
    return jnp.maximum(jnp.where(first >= 0, index - first, continued), 0)


def segment_documents(
    segment_ids: Int[Array, "*batch seq"], before: Int[Array, "*batch"] | None = None
) -> Int[Array, "*batch seq"]:
    """Number of each token's document in its row, -1 at padding.

    Unlike an id a number does not come back. The document that a cache ended in, or
    the first one, is number 0.
    """
    number = jnp.cumsum(segment_starts(segment_ids, before), axis=-1, dtype=jnp.int32)
    return jnp.where(segment_ids >= 0, number, -1)
