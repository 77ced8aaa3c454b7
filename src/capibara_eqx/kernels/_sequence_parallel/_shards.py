"""A sequence cut into pieces, one a device along one axis of a mesh.

What a recurrence does to the state over a piece is one affine map, and a convolution
needs the last inputs before a piece. So every device sums its piece up, the summaries,
small, are gathered, each device applies those of the pieces before its own to the
initial state, and runs the plain operation on its piece from there.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ...internal import nearest
from .._carry import alike


Arrays = dict[str, Array]
State = TypeVar("State", bound=PyTree[Array])


def present(**arguments: Array | None) -> Arrays:
    """The arguments that are given."""
    return {name: x for name, x in arguments.items() if x is not None}


def forget(
    state: Shaped[Array, "..."], where: Bool[Array, "*batch"] | None
) -> Shaped[Array, "..."]:
    """`state` with zeros in some rows: replaced, as it may be infinite there."""
    if where is None:
        return state
    where = where.reshape(*where.shape, *(1,) * (state.ndim - where.ndim))
    return jnp.where(where, jnp.zeros_like(state), state)


def checked(function: Callable[..., Any], *arrays: Arrays) -> Any:
    """Shapes and dtypes of what the plain `function` returns for whole arrays.

    It checks them, too; on a device its messages would name shapes of pieces.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for group in arrays
        for name, x in group.items()
    }
    return jax.eval_shape(function, **shapes)


@dataclass(frozen=True)
class Shards:
    """How a sequence is cut; `run` enters the devices, and what is below serves there.

    - `operation`: the public name, for messages.
    - `mesh`: the devices; over axes that are not named everything is replicated.
    - `axis`: the axis of the mesh that the sequence is cut along.
    - `batch_axis`: the one along which the first batch axis is cut, if any.
    - `batch`: the batch axes of all arguments.
    - `seq`: tokens of the whole sequence.
    """

    operation: str
    mesh: Mesh
    axis: str
    batch_axis: str | None
    batch: tuple[int, ...]
    seq: int

    def __post_init__(self):
        self._check_mesh()
        self._check_axis("axis", self.axis)
        if self.batch_axis is None:
            return
        self._check_axis("batch_axis", self.batch_axis)
        if self.batch_axis == self.axis:
            raise ValueError(
                f"{self.operation}: `batch_axis` must be another axis of the mesh than "
                f"`axis`, got {self.axis!r} for both."
            )
        rows = self.mesh.shape[self.batch_axis]
        if not self.batch or self.batch[0] % rows:
            raise ValueError(
                f"{self.operation}: `batch_axis` {self.batch_axis!r} has {rows} "
                "devices, which must divide the first batch axis; the batch is "
                f"{self.batch}. Pad the batch, or leave `batch_axis` out."
            )

    def _check_mesh(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise ValueError(
                f"{self.operation}: `mesh` must be a jax.sharding.Mesh of the devices "
                f"that the sequence is cut over, got {self.mesh!r}. Make one by "
                f"jax.make_mesh((jax.device_count(),), ({self.axis!r},))."
            )

    def _check_axis(self, argument: str, axis: str) -> None:
        names = tuple(map(str, self.mesh.axis_names))
        if axis not in names:
            raise ValueError(
                f"{self.operation}: `{argument}` must be an axis of the mesh, which "
                f"has {', '.join(names)}; got {axis!r}.{nearest(axis, names)}"
            )

    @property
    def count(self) -> int:
        """Pieces of the sequence."""
        return self.mesh.shape[self.axis]

    @property
    def size(self) -> int:
        """Tokens of a piece, those that pad the last ones included."""
        return -(-self.seq // self.count)

    @property
    def padding(self) -> int:
        """Tokens that are put behind the sequence, so that pieces are equally long."""
        return self.count * self.size - self.seq

    def padded(self, streams: Arrays, **values: int | float) -> Arrays:
        """The streams with padding behind them: `values` by name, or else zeros."""
        if self.padding == 0:
            return streams
        at = len(self.batch)

        def pad(x, value):
            widths = [(0, self.padding if axis == at else 0) for axis in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))

        return {name: pad(x, values.get(name, 0)) for name, x in streams.items()}

    def run(
        self,
        piece: Callable[[Arrays, Arrays, Arrays], tuple[Array, Array]],
        streams: Arrays,
        rows: Arrays,
        weights: Arrays,
    ) -> tuple[Array, Array]:
        """`piece(streams, rows, weights)` on every device.

        **Arguments:**

        - `streams`: padded, `(*batch, padded, ...)`; a device gets its piece.
        - `rows`: `(*batch, ...)`, and `weights`: the same on all devices of `axis`.

        **Returns:**

        Of what `piece` returns the first result as one stream, the padding cut away,
        and the second, which must be the same on all devices.
        """
        batch = (self.batch_axis, *(None,) * (len(self.batch) - 1))[: len(self.batch)]
        stream, row, whole = P(*batch, self.axis), P(*batch), P()
        arguments = [
            {name: self._placed(x, spec) for name, x in arrays.items()}
            for arrays, spec in ((streams, stream), (rows, row), (weights, whole))
        ]

        def own_piece(streams, rows, weights):
            # Weights that vary from here on: their cotangents are summed over the
            # devices as weights, not token by token where they first meet a stream.
            _, weights = alike((streams, weights))
            return piece(streams, rows, weights)

        y, state = jax.shard_map(
            own_piece,
            mesh=self.mesh,
            in_specs=(stream, row, whole),
            out_specs=(stream, row),
        )(*arguments)
        if self.padding == 0:
            return y, state
        # Uneven pieces are no type of an array: along an Explicit axis it is gathered.
        y = self._placed(y, P(*batch))
        return jax.lax.slice_in_dim(y, 0, self.seq, axis=len(batch)), state

    def _placed(self, x, spec):
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if AxisType.Explicit not in types.values():
            return x
        # The type of an array names no other axes.
        spec = P(*(n if types.get(n) == AxisType.Explicit else None for n in spec))
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))

    def index(self) -> Int[Array, ""]:
        """Number of this device's piece."""
        return jax.lax.axis_index(self.axis)

    def entering(
        self,
        advance: Callable[[State, Any], State],
        start: State,
        summary: PyTree[Array],
        *,
        reverse: bool = False,
    ) -> State:
        """The state that enters this device's piece.

        **Arguments:**

        - `advance`: `advance(state, summary)` is the state after a piece.
        - `start`: the state before all pieces.
        - `summary`: of this device's own piece.
        - `reverse`: whether time runs from the last piece to the first.
        """
        if self.count == 1:
            return start
        summaries = jax.lax.all_gather(summary, self.axis)
        start, summaries = alike((start, summaries))
        index = self.index()

        def step(state, one):
            number, summary = one
            before = number > index if reverse else number < index
            # What is not taken reads zeros: a gradient of zero times a state that has
            # overflowed would be NaN.
            nothing = jax.tree.map(jnp.zeros_like, state)
            known = jax.tree.map(functools.partial(jnp.where, before), state, nothing)
            after = advance(known, summary)
            state = jax.tree.map(functools.partial(jnp.where, before), after, state)
            return state, None

        numbers = jnp.arange(self.count, dtype=index.dtype)
        return jax.lax.scan(step, start, (numbers, summaries), reverse=reverse)[0]

    def last(
        self, state: Shaped[Array, "..."], *, reverse: bool = False
    ) -> Shaped[Array, "..."]:
        """`state` of the device that time ends on, on all of them."""
        end = 0 if reverse else self.count - 1
        own = self.index() == end
        return jax.lax.psum(jnp.where(own, state, jnp.zeros_like(state)), self.axis)
