import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from ...internal import NO_STEP
from .._selective_scan import selective_scan
from ._shards import Shards, checked, forget, present


def sharded_selective_scan(
    u: Float[Array, "*batch seq d_inner"],
    delta: Float[Array, "*batch seq d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, "*batch seq d_state"],
    C: Float[Array, "*batch seq d_state"],
    D: Float[Array, " d_inner"] | None = None,
    *,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
    z: Float[Array, "*batch seq d_inner"] | None = None,
    delta_bias: Float[Array, " d_inner"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Array, "*batch d_inner d_state"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*batch seq d_inner"], Float[Array, "*batch d_inner d_state"]]:
    r"""`selective_scan` of sequences that are sharded over one axis of a mesh.

    Over the piece of one device the scan is one affine map of the state,

    $$h_{\mathrm{end}} = \exp\Big(A \sum_t \Delta_t\Big)\, h_{\mathrm{start}} + e$$

    with $e$ the end state from zero. The sums and the end states are gathered,
    `batch * d_inner * (d_state + 1)` numbers a device, each device composes the maps
    before its own, and scans its piece from the state that enters it. So it scans its
    piece twice, without the gate the first time: with $n$ devices each does $2/n$ of
    the work, and holds $1/n$ of the arguments and results. Correcting the outputs of
    the first scan would cost as much as the second. Gu and Dao, *Mamba*, arXiv
    2312.00752, for the scan; Martin and Cundy, arXiv 1709.04057, for the composition.

    Differentiable any number of times, forward and reverse, in every array argument;
    works under `jit`, over mesh axes of type Auto or Explicit.

    **Arguments:**

    Those of `selective_scan`, as global arrays, and

    - `mesh`: the devices.
    - `axis`: name of the mesh axis that `seq` is sharded over. A length that the number
        of its devices does not divide is padded, which copies the arguments.
    - `batch_axis`: name of the mesh axis that the first batch axis is sharded over, if
        any. Over the other axes of the mesh everything is replicated.

    **Returns:**

    `(y, final_state)` of `selective_scan`: `y` is sharded like the arguments (along an
    Explicit axis only if its devices divide the length), `final_state` replicated over
    `axis`.

    **Raises:**

    `ValueError` naming the argument that does not fit, the axis that the mesh
    does not have, or an unknown implementation. `NotImplementedError` with the reason
    if the implementation that was named cannot serve.

    !!! example

        ```python
        mesh = jax.sharding.Mesh(jax.devices(), ("seq",))

        @jax.jit
        def scan(u, delta, A, B, C):
            return sharded_selective_scan(u, delta, A, B, C, mesh=mesh, axis="seq")

        y, state = scan(u, delta, A, B, C)
        ```
    """
    plain = functools.partial(
        selective_scan, delta_softplus=delta_softplus, implementation=implementation
    )
    streams = present(u=u, delta=delta, B=B, C=C, z=z, reset=reset)
    rows = present(initial_state=initial_state)
    weights = present(A=A, D=D, delta_bias=delta_bias)
    _, result = checked(plain, streams, rows, weights)
    shards = Shards(
        "sharded_selective_scan", mesh, axis, batch_axis, u.shape[:-2], u.shape[-2]
    )
    if shards.padding and delta_bias is not None and not delta_softplus:
        # Padding is to be a step of zero, and a bias may not have an exact negative in
        # the dtype of `delta`: so it is added here.
        streams["delta"] = _steps(delta, weights.pop("delta_bias"), False, result.dtype)
    streams = shards.padded(streams, delta=NO_STEP if delta_softplus else 0)

    def piece(streams, rows, weights):
        dtype, A = result.dtype, weights["A"].astype(result.dtype)
        zero = jnp.zeros((*streams["u"].shape[:-2], *A.shape), dtype)
        ungated = {name: x for name, x in streams.items() if name != "z"}
        straight = {name: x for name, x in weights.items() if name != "D"}
        _, end = plain(**ungated, **straight, initial_state=zero)
        reset = streams.get("reset")
        fresh = None if reset is None else jnp.any(reset, axis=-1)
        bias = weights.get("delta_bias")
        steps = _steps(streams["delta"], bias, delta_softplus, dtype)
        total = forget(jnp.sum(steps, axis=-2), fresh)

        def advance(state, summary):
            total, end, fresh = summary
            decay = jnp.exp(total[..., None] * jnp.broadcast_to(A, state.shape))
            return decay * forget(state, fresh) + end

        start = rows["initial_state"].astype(dtype) if rows else zero
        start = shards.entering(advance, start, (total, end, fresh))
        y, state = plain(**streams, **weights, initial_state=start)
        return y, shards.last(state)

    return shards.run(piece, streams, rows, weights)


def _steps(delta, bias, softplus, dtype):
    steps = delta.astype(dtype)
    if bias is not None:
        steps = steps + jnp.broadcast_to(bias.astype(dtype), steps.shape)
    return jax.nn.softplus(steps) if softplus else steps
