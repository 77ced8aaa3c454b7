import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ..internal import last_segment


def check_cache(layer: str, cache: PyTree, expected: PyTree) -> None:
    """Raise `ValueError` unless `cache` has the structure and shapes of `expected`.

    `expected` holds `jax.ShapeDtypeStruct`s: what the layer's own `init_cache` makes
    for the batch axes of the input.
    """
    if type(cache) is not type(expected):
        raise ValueError(
            f"{layer}: `cache` must be a {type(expected).__name__}, got "
            f"{type(cache).__name__}. Make it with this layer's `init_cache`."
        )
    got = jax.tree.leaves_with_path(cache)
    want = jax.tree.leaves_with_path(expected)
    for (path, leaf), (_, spec) in zip(got, want, strict=True):
        if leaf.shape != spec.shape:
            raise ValueError(
                f"{layer}: `cache{jax.tree_util.keystr(path)}` has shape {leaf.shape}, "
                f"expected {spec.shape}: the cache is of another layer or of another "
                "batch shape. Make it with this layer's `init_cache(batch_shape)`, "
                "where `batch_shape` is the batch axes of the input."
            )


def advance_segment(
    segment: Int[Array, "*batch"], segment_ids: Int[Array, "*batch seq"] | None
) -> Int[Array, "*batch"]:
    """The document that a cache ends in after reading `segment_ids`.

    Without ids the tokens continue the current document, which is number 0 if the
    cache had seen nothing.
    """
    if segment_ids is None:
        return jnp.maximum(segment, 0)
    return last_segment(segment_ids, segment).astype(segment.dtype)


def fresh_segment(batch_shape: tuple[int, ...]) -> Int[Array, "*batch"]:
    """Marks a cache that has seen nothing: no document yet."""
    return jnp.full(batch_shape, -1, jnp.int32)
