import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Shaped


def start_of(
    state: Shaped[Array, "*state"] | None,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *entering: Shaped[Array, "..."] | None,
) -> Shaped[Array, "*state"]:
    """What a scan starts from, typed like what enters it.

    Inside `jax.shard_map` the type of an array says along which axes of the mesh it
    varies, and on a mesh with explicit axes how it is sharded. Fresh zeros do neither,
    and a carry may not change its type on the way. A sum has the type of all its terms.

    **Arguments:**

    - `state`: the initial state; zeros if not given.
    - `shape`, `dtype`: of the result.
    - `entering`: what the state will meet, each in a shape that broadcasts to `shape`.

    **Returns:**

    `state` in `dtype`.
    """
    start = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    for x in entering:
        if x is not None:
            start = start + jnp.broadcast_to(jnp.zeros_like(x, dtype), shape)
    return start
