import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer

from ..internal import check_ids


def ids_in_range(
    layer: str, argument: str, ids: Integer[Array, "*shape"], size: int, hint: str
) -> Int[Array, "*shape"]:
    """`ids` as int32; a runtime error, under `jit` too, unless all lie in [0, size).

    `hint` ends the message: the likely fix. What the dtype of `ids` rules out is not
    looked for, so that bytes in a table of 256 cost no check.
    """
    check_ids(layer, argument, ids)
    # Before the conversion to int32, which wraps.
    limits = jnp.iinfo(ids.dtype)
    outside = []
    if limits.min < 0:
        outside.append(ids < 0)
    if limits.max >= size:
        outside.append(ids >= size)
    ids = ids.astype(jnp.int32)
    if not outside:
        return ids
    return eqx.error_if(
        ids,
        jnp.any(jnp.stack(outside)),
        f"{layer}: `{argument}` must lie between 0 and {size - 1}. {hint}",
    )
