import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Inexact

from .._linear_recurrence import linear_recurrence
from ._shards import Shards, checked, forget, present


def sharded_linear_recurrence(
    a: Inexact[Array, "*batch seq d"],
    x: Inexact[Array, "*batch seq d"],
    *,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
    initial_state: Inexact[Array, "*batch d"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Inexact[Array, "*batch seq d"], Inexact[Array, "*batch d"]]:
    r"""`linear_recurrence` of sequences that are sharded over one axis of a mesh.

    Over the piece of one device the recurrence is one affine map of the state,

    $$h_{\mathrm{end}} = \Big(\prod_t a_t\Big)\, h_{\mathrm{start}} + e$$

    with $e$ the end state from zero. The maps are gathered, `2 * batch * d` numbers a
    device, each device composes those before its own, and runs its piece from the state
    that enters it. So it reads its piece twice and never the piece of another. Martin
    and Cundy, *Parallelizing Linear Recurrent Neural Nets Over Sequence Length*, arXiv
    1709.04057.

    A correction of the states from zero by cumulative products would cost as much, and
    a product that overflows would meet a state of zero.

    Differentiable any number of times, forward and reverse; works under `jit`, over
    mesh axes of type Auto or Explicit.

    **Arguments:**

    Those of `linear_recurrence`, as global arrays, and

    - `mesh`: the devices.
    - `axis`: name of the mesh axis that `seq` is sharded over. A length that the number
        of its devices does not divide is padded, which copies the arguments.
    - `batch_axis`: name of the mesh axis that the first batch axis is sharded over, if
        any. Over the other axes of the mesh everything is replicated.

    **Returns:**

    `(h, final_state)` of `linear_recurrence`: `h` is sharded like the arguments (along
    an Explicit axis only if its devices divide the length), `final_state` replicated
    over `axis`.

    **Raises:**

    `ValueError` naming the argument that does not fit, the axis that the mesh
    does not have, or an unknown implementation.

    !!! example

        ```python
        mesh = jax.sharding.Mesh(jax.devices(), ("seq",))
        options = {"mesh": mesh, "axis": "seq"}
        h, last = jax.jit(lambda *ax: sharded_linear_recurrence(*ax, **options))(a, x)
        ```
    """
    plain = functools.partial(
        linear_recurrence, reverse=reverse, implementation=implementation
    )
    rows = present(initial_state=initial_state)
    streams = present(a=a, x=x, reset=reset)
    _, result = checked(plain, streams, rows)
    shards = Shards(
        "sharded_linear_recurrence", mesh, axis, batch_axis, x.shape[:-2], x.shape[-2]
    )
    # A padded token keeps the state.
    streams = shards.padded(streams, a=1)

    def piece(streams, rows, weights):
        del weights
        dtype, reset = result.dtype, streams.get("reset")
        zero = jnp.zeros_like(streams["x"][..., 0, :], dtype)
        _, end = plain(**streams, initial_state=zero)
        fresh = None if reset is None else jnp.any(reset, axis=-1)
        decays = streams["a"].astype(dtype)
        if fresh is not None:
            # Not a factor of zero, which may meet one that has overflowed.
            decays = jnp.where(fresh[..., None, None], jnp.ones_like(decays), decays)
        # The product is a recurrence of nothing from one: the gradient of `jnp.prod` is
        # as many products again for each halving of the length.
        _, decay = plain(
            decays, jnp.zeros_like(decays), initial_state=jnp.ones_like(zero)
        )
        start = rows["initial_state"].astype(dtype) if rows else zero
        start = shards.entering(_advance, start, (decay, end, fresh), reverse=reverse)
        h, state = plain(**streams, initial_state=start)
        return h, shards.last(state, reverse=reverse)

    return shards.run(piece, streams, rows, {})


def _advance(state, summary):
    decay, end, fresh = summary
    return decay * forget(state, fresh) + end
