import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from ...internal import (
    last_segment,
    promote_dtypes,
    segment_documents,
    segment_starts,
    zero_padding,
)
from .._causal_conv import causal_conv
from ._shards import Shards, checked, forget, present


def sharded_causal_conv(
    x: Float[Array, "*batch seq c_in"],
    weight: Float[Array, "c_out c_in_per_group width"],
    bias: Float[Array, " c_out"] | None = None,
    *,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None = None,
    activation: str | None = None,
    dilation: int = 1,
    groups: int = 1,
    initial_state: Float[Array, "*batch reach c_in"] | None = None,
    segment_ids: Int[Array, "*batch seq"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*batch seq c_out"], Float[Array, "*batch reach c_in"]]:
    r"""`causal_conv` of sequences that are sharded over one axis of a mesh.

    A device needs the last `reach = (width - 1) * dilation` inputs before its piece.
    Its left neighbour sends them, and where pieces are shorter than that, devices
    further left as well. With `segment_ids` padding does not count, so that those
    inputs may come from anywhere on the left: then the last valid inputs of all pieces
    are gathered, `reach * c_in` numbers a device and row, with the documents that they
    belong to.

    Differentiable any number of times, forward and reverse; works under `jit`, over
    mesh axes of type Auto or Explicit.

    **Arguments:**

    Those of `causal_conv`, as global arrays, and

    - `mesh`: the devices.
    - `axis`: name of the mesh axis that `seq` is sharded over. A length that the number
        of its devices does not divide is padded, which copies the arguments.
    - `batch_axis`: name of the mesh axis that the first batch axis is sharded over, if
        any. Over the other axes of the mesh everything is replicated.

    **Returns:**

    `(y, final_state)` of `causal_conv`: `y` is sharded like the arguments (along an
    Explicit axis only if its devices divide the length), `final_state` replicated over
    `axis`.

    **Raises:**

    `ValueError` naming the argument that does not fit, the axis that the mesh
    does not have, or an unknown activation or implementation. `NotImplementedError`
    with the reason if the implementation that was named cannot serve.

    !!! example

        ```python
        mesh = jax.sharding.Mesh(jax.devices(), ("seq",))
        options = {"mesh": mesh, "axis": "seq", "groups": x.shape[-1]}
        y, state = jax.jit(lambda x: sharded_causal_conv(x, weight, **options))(x)
        ```
    """
    plain = functools.partial(
        causal_conv,
        activation=activation,
        dilation=dilation,
        groups=groups,
        implementation=implementation,
    )
    rows = present(initial_state=initial_state)
    weights = present(weight=weight, bias=bias)
    streams = present(x=x, segment_ids=segment_ids)
    _, result = checked(plain, streams, rows, weights)
    shards = Shards(
        "sharded_causal_conv", mesh, axis, batch_axis, x.shape[:-2], x.shape[-2]
    )
    if segment_ids is not None:
        streams["segment_ids"] = _signed(segment_ids)
    streams = shards.padded(streams, segment_ids=-1)
    # Of what passes between pieces nothing is rounded.
    dtype = promote_dtypes(x.dtype, result.dtype)

    def piece(streams, rows, weights):
        x, ids = streams["x"], streams.get("segment_ids")
        shape = (*x.shape[:-2], *result.shape[-2:])
        zero = jnp.zeros(shape, dtype)
        history = rows["initial_state"].astype(dtype) if rows else zero
        run = functools.partial(plain, **streams, **weights)
        if ids is None:
            y, _ = run(initial_state=_halo(shards, x, history))
            state = _last_inputs(shards, x, history)
        else:
            y, state = run(initial_state=_halo_of_documents(shards, x, ids, history))
            state = shards.last(state)
        return y, state.astype(result.dtype)

    return shards.run(piece, streams, rows, weights)


def _signed(ids: Shaped[Array, "*batch seq"]) -> Int[Array, "*batch seq"]:
    """The same ids in a dtype that has a negative one, which padding gets."""
    unsigned = jnp.issubdtype(ids.dtype, jnp.unsignedinteger)
    return ids.astype(jnp.result_type(int)) if unsigned else ids


def _halo(
    shards: Shards,
    x: Float[Array, "*batch size c_in"],
    history: Float[Array, "*batch reach c_in"],
) -> Float[Array, "*batch reach c_in"]:
    """The last `reach` inputs before this device's piece of `x`."""
    size, reach = x.shape[-2], history.shape[-2]
    # What no device has is of the history: row r is input `index * size + r` of it and
    # of the zeros behind it. Where a device gets nothing, it gets zeros.
    behind = _between(0, history, reach)
    start = jnp.minimum(shards.index() * size, reach)
    inputs = jax.lax.dynamic_slice_in_dim(behind, start, reach, axis=x.ndim - 2)
    for hop in range(1, min(shards.count, -(-reach // size) + 1)):
        stop = reach - (hop - 1) * size
        tokens = min(size, stop)
        passes = [(j, j + hop) for j in range(shards.count - hop)]
        sent = jax.lax.ppermute(x[..., size - tokens :, :], shards.axis, passes)
        sent = sent.astype(history.dtype)
        inputs = inputs + _between(stop - tokens, sent, reach - stop)
    return inputs


def _between(
    before: int, x: Float[Array, "*batch seq c_in"], after: int
) -> Float[Array, "*batch padded c_in"]:
    """`x` between zeros: jax 0.7 cannot differentiate twice what concatenates them."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(before, after), (0, 0)])


def _last_inputs(
    shards: Shards,
    x: Float[Array, "*batch size c_in"],
    history: Float[Array, "*batch reach c_in"],
) -> Float[Array, "*batch reach c_in"]:
    """The last `reach` of the history and all inputs, on all devices."""
    size, reach, seq = x.shape[-2], history.shape[-2], shards.seq
    count = min(reach, seq)
    index = shards.index()
    local = jnp.arange(seq - count, seq, dtype=index.dtype) - index * size
    own = ((local >= 0) & (local < size)).reshape(*(1,) * (x.ndim - 2), count, 1)
    found = jnp.take(x, jnp.clip(local, 0, size - 1), axis=-2)
    found = jnp.where(own, found, jnp.zeros_like(found))
    found = jax.lax.psum(found, shards.axis).astype(history.dtype)
    found = _between(reach - count, found, 0)
    return found + _between(0, history[..., count:, :], count)


class _Summary(NamedTuple):
    """What a piece leaves to the next one.

    - `tail`: its last valid inputs, zero where not of its last document.
    - `kept`: how many rows of `tail` are its own, at most all of them.
    - `first`, `last`: ids of its first and last valid token, negative if it has none.
    - `several`: whether a document starts within it.
    """

    tail: Float[Array, "*batch reach c_in"]
    kept: Int[Array, "*batch"]
    first: Int[Array, "*batch"]
    last: Int[Array, "*batch"]
    several: Bool[Array, "*batch"]

    def restarts(self, last: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        """Whether its first token is of another document than the one before."""
        return (self.first >= 0) & (last >= 0) & (self.first != last)


def _halo_of_documents(
    shards: Shards,
    x: Float[Array, "*batch size c_in"],
    ids: Int[Array, "*batch size"],
    history: Float[Array, "*batch reach c_in"],
) -> Float[Array, "*batch reach c_in"]:
    """The last valid inputs of the document that this device's piece begins in."""
    reach = history.shape[-2]
    none = jnp.full(ids.shape[:-1], -1, ids.dtype)
    summary = _Summary(
        _tail(x, ids, reach),
        jnp.minimum(jnp.sum(ids >= 0, axis=-1, dtype=jnp.int32), reach),
        last_segment(ids[..., ::-1], none),
        last_segment(ids, none),
        jnp.any(segment_starts(ids), axis=-1),
    )

    def advance(known, piece):
        state, last = known
        state = forget(state, piece.restarts(last) | piece.several)
        # Its own inputs push those before them out.
        kept = piece.kept[..., None]
        row = jnp.arange(reach, dtype=kept.dtype)
        row = row.reshape(*(1,) * (kept.ndim - 1), reach) + kept
        moved = jnp.minimum(row, reach - 1)[..., None]
        moved = jnp.take_along_axis(state, moved, axis=-2)
        tail = piece.tail.astype(state.dtype)
        state = jnp.where((row < reach)[..., None], moved, tail)
        return state, jnp.where(piece.last >= 0, piece.last, last)

    state, last = shards.entering(advance, (history, none), summary)
    return forget(state, summary.restarts(last))


def _tail(
    x: Float[Array, "*batch size c_in"], ids: Int[Array, "*batch size"], reach: int
) -> Float[Array, "*batch reach c_in"]:
    """The last `reach` valid inputs, zeros where not of the last document."""
    valid = ids >= 0
    order = jnp.argsort(~valid, axis=-1, stable=True)
    count = jnp.sum(valid, axis=-1, keepdims=True, dtype=order.dtype)
    row = jnp.arange(reach, dtype=order.dtype) - reach
    row = row.reshape(*(1,) * (count.ndim - 1), reach) + count
    token = jnp.take_along_axis(order, jnp.maximum(row, 0), axis=-1)
    document = segment_documents(ids)
    current = jnp.take_along_axis(document, token, axis=-1)
    own = (row >= 0) & (current == jnp.max(document, axis=-1, keepdims=True))
    x = jnp.take_along_axis(zero_padding(x, ids), token[..., None], axis=-2)
    return jnp.where(own[..., None], x, jnp.zeros_like(x))
