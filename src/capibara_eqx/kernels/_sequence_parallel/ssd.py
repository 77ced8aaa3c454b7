import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from .._ssd import ssd
from ._shards import Shards, checked, forget, present


def sharded_ssd(
    x: Float[Array, "*batch seq n_heads head_dim"],
    log_decay: Float[Array, "*batch seq n_heads"],
    B: Float[Array, "*batch seq n_groups d_state"],
    C: Float[Array, "*batch seq n_groups d_state"],
    *,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
    coefficient: Float[Array, "*batch seq n_heads"] | None = None,
    initial_state: Float[Array, "*batch n_heads head_dim d_state"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    chunk_size: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[
    Float[Array, "*batch seq n_heads head_dim"],
    Float[Array, "*batch n_heads head_dim d_state"],
]:
    r"""`ssd` of sequences that are sharded over one axis of a mesh.

    Over the piece of one device the dual is one affine map of the state,

    $$h_{\mathrm{end}} = \exp\Big(\sum_t a_t\Big)\, h_{\mathrm{start}} + e$$

    with $e$ the end state from zero. The sums and the end states are gathered,
    `batch * n_heads * (head_dim * d_state + 1)` numbers a device, each device composes
    the maps before its own, and runs its piece from the state that enters it. Of the
    four products of a chunk the first pass has one, that of the end state. Dao and Gu,
    *Transformers are SSMs*, arXiv 2405.21060.

    Differentiable any number of times, forward and reverse, in every array argument;
    works under `jit`, over mesh axes of type Auto or Explicit.

    **Arguments:**

    Those of `ssd`, as global arrays, and

    - `mesh`: the devices.
    - `axis`: name of the mesh axis that `seq` is sharded over. A length that the number
        of its devices does not divide is padded, which copies the arguments.
    - `batch_axis`: name of the mesh axis that the first batch axis is sharded over, if
        any. Over the other axes of the mesh everything is replicated.

    **Returns:**

    `(y, final_state)` of `ssd`: `y` is sharded like the arguments (along an Explicit
    axis only if its devices divide the length), `final_state` replicated over `axis`.

    **Raises:**

    `ValueError` naming the argument that does not fit, the axis that the mesh
    does not have, or an unknown implementation.

    !!! example

        ```python
        mesh = jax.sharding.Mesh(jax.devices(), ("seq",))
        x, dt = jnp.ones((2, 16, 4, 8)), jnp.ones((2, 16, 4))
        B = C = jnp.ones((2, 16, 1, 3))

        @jax.jit
        def dual(x, log_decay, B, C):
            return sharded_ssd(x, log_decay, B, C, mesh=mesh, axis="seq")

        y, state = dual(x, -dt, B, C)
        ```
    """
    plain = functools.partial(ssd, chunk_size=chunk_size, implementation=implementation)
    streams = present(
        x=x, log_decay=log_decay, B=B, C=C, coefficient=coefficient, reset=reset
    )
    rows = present(initial_state=initial_state)
    _, result = checked(plain, streams, rows)
    shards = Shards("sharded_ssd", mesh, axis, batch_axis, x.shape[:-3], x.shape[-3])
    # A padded token decays nothing and adds nothing.
    streams = shards.padded(streams)

    def piece(streams, rows, weights):
        del weights
        dtype, reset = result.dtype, streams.get("reset")
        lead = len(shards.batch)
        shape = (*streams["x"].shape[:lead], *result.shape[lead:])
        zero = jnp.zeros(shape, dtype)
        _, end = plain(**streams, initial_state=zero)
        fresh = None if reset is None else jnp.any(reset, axis=-1)
        total = jnp.sum(streams["log_decay"].astype(dtype), axis=-2)
        start = rows["initial_state"].astype(dtype) if rows else zero
        summary = (forget(total, fresh), end, fresh)
        start = shards.entering(_advance, start, summary)
        y, state = plain(**streams, initial_state=start)
        return y, shards.last(state)

    return shards.run(piece, streams, rows, {})


def _advance(state, summary):
    total, end, fresh = summary
    return jnp.exp(total)[..., None, None] * forget(state, fresh) + end
