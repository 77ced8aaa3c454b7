"""The operands of the scan as the GPU kernels take them, and their results back.

Everything here is plain JAX around the kernels: padding to whole chunks and tiles, the
cut of rows along the sequence and the states between the cuts, sums of partial results.
Where the shapes are whole already, as those of most models are, nothing is copied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._pallas_gpu_launch import LANES, Launch, Stream, launch, struct_like
from ._operands import Operands, saved_shape
from ._pallas_gpu_backward import adjoint_body, backward_body
from ._pallas_gpu_forward import Form, forward_body
from ._tuning import Sizes


# What one block may take of a Hopper processor's shared memory, and what leaves room
# for two; a processor keeps 1 KiB a block to itself, Mosaic some for its barriers.
SHARED = 226 * 1024
_SHARED_BY_TWO = 112 * 1024

# Blocks that keep a Hopper chip busy: two for each of its 132 processors.
_BLOCKS = 264

# States of one part in registers; with as many decays they leave a thread, which has
# 255 registers, enough for the rest.
_STATES_IN_REGISTERS = 64

# A copy into shared memory must begin at a multiple of 128 bytes there, and Mosaic
# begins every buffer at a multiple of 1 KiB.
_FLAGS = 32
_ALIGNMENT = 1024


class Tiles(NamedTuple):
    """How the work is cut; `tiles_for` chooses."""

    group: int  # states of a channel in registers at a time, 8 or 16
    tokens: int  # tokens whose states are; times `group` 64, but for the interpreter
    stages: int  # chunks in shared memory, one in use and the others on their way
    splits: int  # parts of a row that run side by side


def tiles_for(operands: Operands, sizes: Sizes) -> Tiles:
    """Tiles as `sizes` say, if shared memory has room for such.

    If not, such that leave room for two blocks on a processor, or else for one. No
    measurement on a GPU stands behind this order of preference. Behind the limits does
    what the compiler says for `sm_90a`: with 16 states, four tokens and chunks of 16,
    forward takes 110 to 168 registers a thread, backward all 255 and spills none.
    """
    groups = [g for g in (16, 8) if _up(operands.A.shape[-1], 8) % g == 0]
    options = [(group, stages) for stages in (2, 1) for group in groups]
    needed = {o: shared_bytes(operands, sizes.chunk, *o) for o in options}
    small = [option for option in options if needed[option] <= _SHARED_BY_TWO]
    group, stages = small[0] if small else min(options, key=needed.__getitem__)
    if sizes.group in groups and sizes.stages is not None:
        wanted = (sizes.group, sizes.stages)
        if shared_bytes(operands, sizes.chunk, *wanted) <= SHARED:
            group, stages = wanted
    splits = _splits(operands, sizes.chunk)
    return Tiles(group, _STATES_IN_REGISTERS // group, stages, splits)


def _splits(operands, chunk):
    rows, seq, d_inner = operands.u.shape
    chunks = _ceil(seq, chunk)
    # A cut should have a few chunks, or its first and last steps are all it has.
    wanted = min(_BLOCKS // (rows * _ceil(d_inner, LANES)), chunks // 4)
    # Two passes take the time of a bit less than two: two cuts would gain nothing.
    if wanted < 3:
        return 1
    whole = [s for s in range(wanted, wanted // 2, -1) if chunks % s == 0]
    return whole[0] if whole else _ceil(chunks, _ceil(chunks, wanted))


def shared_bytes(operands: Operands, chunk: int, group: int, stages: int) -> int:
    """Shared memory of a block of the backward kernel; forward takes less."""
    states, tokens = _up(operands.A.shape[-1], 8), _STATES_IN_REGISTERS // group
    wide = [operands.u, operands.delta, operands.u]
    wide += [] if operands.z is None else [operands.z]
    sizes = [stages * chunk * LANES * x.dtype.itemsize for x in wide]
    sizes += [
        stages * chunk * states * x.dtype.itemsize for x in (operands.B, operands.C)
    ]
    if operands.reset is not None:
        sizes.append(stages * _up(chunk, _FLAGS) * 4)
    scratch = _backward_scratch(chunk, states, group, tokens)
    sizes += [4 * x.size for x in scratch.values()]
    return sum(_up(size, _ALIGNMENT) for size in sizes)


def _backward_scratch(chunk, states, group, tokens):
    return {
        "decay": _floats(states, LANES),
        "carry": _floats(states, LANES),
        "dA_acc": _floats(states, LANES),
        "sums": _floats(2, LANES),
        "states": _floats(chunk // tokens, states, LANES),
        "terms": _floats(LANES, 2 * group + 1),
        "folded": _floats(tokens, LANES // (2 * group), 2 * group),
    }


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ceil(size, part):
    return -(-size // part)


def _up(size, multiple):
    return _ceil(size, multiple) * multiple


def _padded(x, *sizes):
    """`x` with its last axes padded by zeros at their ends."""
    lead = x.ndim - len(sizes)
    extra = [size - had for size, had in zip(sizes, x.shape[lead:], strict=True)]
    if not any(extra):
        return x
    return jnp.pad(x, [(0, 0)] * lead + [(0, e) for e in extra])


class Work:
    """One call of the scan: its operands, padded and cut, and the kernels on them."""

    def __init__(
        self,
        operands: Operands,
        softplus: bool,
        sizes: Sizes,
        interpret: bool,
        dy: Float[Array, "rows seq d_inner"] | None = None,
    ):
        rows, seq, d_inner = operands.u.shape
        groups, _, d_state = operands.A.shape
        chunk, tiles = sizes.chunk, tiles_for(operands, sizes)
        if interpret:
            # It gains nothing from more, and XLA would compile them for a minute.
            tiles = tiles._replace(group=8, tokens=2)
        per_split = _ceil(_ceil(seq, chunk), tiles.splits)
        states, width = _up(d_state, 8), _up(d_inner, LANES)
        self.operands, self.tiles, self.interpret = operands, tiles, interpret
        self.splits, self.width = tiles.splits, width
        self.form = Form(
            softplus=softplus,
            seq=seq,
            splits=tiles.splits,
            span=per_split * chunk,
            chunk=chunk,
            tokens=tiles.tokens,
            states=states,
            group=tiles.group,
            rows_per_weights=rows * tiles.splits // groups,
        )
        self.grid = (width // LANES, rows * tiles.splits, per_split)
        arrays = [x for x in (*operands, dy) if x is not None]
        self._struct = struct_like(arrays)
        self.streams = {
            **{k: self._wide_in(getattr(operands, k)) for k in ("u", "delta", "z")},
            **{k: self._narrow_in(getattr(operands, k)) for k in ("B", "C")},
            "dy": self._wide_in(dy),
            "reset": self._reset_in(operands.reset),
        }
        A = _padded(operands.A.transpose(0, 2, 1), states, width)
        self.weights = {"A": A, "D": operands.D, "bias": operands.delta_bias}
        for name in ("D", "bias"):
            if self.weights[name] is not None:
                self.weights[name] = _padded(self.weights[name], width)

    # Operands in, results out.

    def _tokens_in(self, x):
        """The token axis padded, and cut as rows of their own."""
        x = _padded(x, self.splits * self.form.span, *x.shape[2:])
        return x.reshape(-1, self.form.span, *x.shape[2:])

    def _wide_in(self, x):
        if x is None:
            return None
        x = self._tokens_in(_padded(x, self.width))
        block = (None, self.form.chunk, LANES)
        return Stream(x, block, lambda tile, row, chunk: (row, chunk, tile))

    def _narrow_in(self, x):
        x = self._tokens_in(_padded(x, self.form.states))
        block = (None, self.form.chunk, self.form.states)
        return Stream(x, block, lambda tile, row, chunk: (row, chunk, 0))

    def _reset_in(self, x):
        if x is None:
            return None
        x = self._tokens_in(x.astype(jnp.int32))
        x = x.reshape(x.shape[0], -1, self.form.chunk)
        x = _padded(x, _up(self.form.chunk, _FLAGS))
        block = (None, None, x.shape[-1])
        return Stream(x, block, lambda tile, row, chunk: (row, chunk, 0))

    def state_in(self, x):
        return _padded(x.transpose(0, 2, 1), self.form.states, self.width)

    def state_out(self, x, cut):
        """The state of each row, from the states of its cut number `cut`."""
        d_inner, d_state = self.operands.A.shape[1:]
        x = x.reshape(-1, self.splits, *x.shape[1:])[:, cut]
        return x[:, :d_state, :d_inner].transpose(0, 2, 1)

    def wide_out(self, x):
        rows, seq, d_inner = self.operands.u.shape
        return x.reshape(rows, -1, x.shape[-1])[:, :seq, :d_inner]

    def saved_out(self, x):
        rows, chunks, d_state, d_inner = saved_shape(self.operands, self.form.chunk)
        x = x.reshape(rows, -1, *x.shape[2:])
        return x[:, :chunks, :d_state, :d_inner]

    def _saved_in(self, x):
        sizes = (self.splits * self.grid[2], self.form.states, self.width)
        return _padded(x, *sizes).reshape(-1, self.grid[2], *sizes[1:])

    def per_row(self, x):
        """Sums over the cuts of a row, in their order."""
        d_inner, d_state = self.operands.A.shape[1:]
        x = x.reshape(-1, self.splits, *x.shape[1:]).sum(1)
        return x[:, :d_inner] if x.ndim == 2 else x[:, :d_state, :d_inner]

    def sums_over_channels(self, x):
        """The cotangents of B and C, from those of each tile of channels."""
        rows, seq, d_state = self.operands.B.shape
        # (rows, parts of tokens, groups, tokens, 2, states of a group)
        x = x.sum(1).reshape(*x.shape[:1], *x.shape[2:-1], 2, self.form.group)
        x = x.transpose(4, 0, 1, 3, 2, 5).reshape(2, rows, -1, self.form.states)
        return x[:, :, :seq, :d_state]

    def states_between(self, first, added, elapsed, *, backwards):
        """The states that enter the cuts of each row, from its end of entry on.

        A cut adds `added` to what is left of the state that entered it: all of it after
        a decay for the time `elapsed`, nothing if a token of the cut drops the state.
        """
        first, added, elapsed = (
            x.reshape(first.shape[0], -1, *x.shape[1:]) for x in (first, added, elapsed)
        )
        rows, groups = first.shape[0], self.weights["A"].shape[0]
        A = jnp.repeat(self.weights["A"], rows // groups, axis=0)[:, None]
        decay = jnp.exp(A * elapsed[:, :, None])
        dropped = jnp.zeros(added.shape[:2], bool)
        if self.streams["reset"] is not None:
            flags = self.streams["reset"].array
            dropped = (flags != 0).any((1, 2)).reshape(dropped.shape)
        dropped = jnp.broadcast_to(dropped[:, :, None, None], added.shape)
        if backwards:
            decay, dropped, added = (x[:, ::-1] for x in (decay, dropped, added))
        _, _, entering = jax.lax.associative_scan(
            _one_cut_then_another,
            (
                jnp.concatenate([jnp.ones_like(first), decay[:, :-1]], 1),
                jnp.concatenate([jnp.zeros_like(dropped[:, :1]), dropped[:, :-1]], 1),
                jnp.concatenate([first, added[:, :-1]], 1),
            ),
            axis=1,
        )
        entering = entering[:, ::-1] if backwards else entering
        return entering.reshape(-1, *entering.shape[2:])

    # The kernels.

    def _out(self, *shape, dtype=jnp.float32):
        return self._struct(shape, dtype)

    def _like(self, name):
        stream = self.streams[name]
        if stream is None:
            return None
        return self._out(*stream.array.shape, dtype=stream.array.dtype)

    def _launch(self, body, absent, whole, outputs, scratch, *, backwards):
        streams = {k: None if k in absent else v for k, v in self.streams.items()}
        if not backwards:
            del streams["dy"]
        job = Launch(
            name="selective_scan_" + body.__name__.removesuffix("_body"),
            body=functools.partial(body, self.form),
            grid=self.grid,
            streams=streams,
            whole={**self.weights, **whole},
            outputs=outputs,
            scratch=scratch,
            backwards=backwards,
            stages=self.tiles.stages,
        )
        return launch(job, interpret=self.interpret)

    def forward(self, initial, *, states_only=False, save=False) -> dict[str, Any]:
        """`y`, `final` and `saved`, or `final` and `elapsed` if `states_only`."""
        _, rows, chunks = self.grid
        state = (rows, self.form.states, self.width)
        return self._launch(
            forward_body,
            absent=("C", "z") if states_only else (),
            whole={"initial": initial},
            outputs={
                "y": None if states_only else self._like("u"),
                "final": self._out(*state),
                "saved": self._out(rows, chunks, *state[1:]) if save else None,
                "elapsed": self._out(rows, self.width) if states_only else None,
            },
            scratch={
                "decay": _floats(self.form.states, LANES),
                "state": _floats(self.form.states, LANES),
                "clock": _floats(LANES) if states_only else None,
            },
            backwards=False,
        )

    def adjoint(self, dfinal) -> dict[str, Any]:
        """`dinitial` and `elapsed`."""
        rows, states = self.grid[1], self.form.states
        return self._launch(
            adjoint_body,
            absent=("B",),
            whole={"dfinal": dfinal},
            outputs={
                "dinitial": self._out(rows, states, self.width),
                "elapsed": self._out(rows, self.width),
            },
            scratch={
                "decay": _floats(states, LANES),
                "carry": _floats(states, LANES),
                "clock": _floats(LANES),
            },
            backwards=True,
        )

    def backward(self, saved, dfinal) -> dict[str, Any]:
        """The cotangents of all operands, by name; those of B and C as `dBC`."""
        form, (tiles, rows, chunks) = self.form, self.grid
        groups, parts = form.states // form.group, chunks * form.chunk // form.tokens
        one_a_channel = self._out(rows, self.width)
        return self._launch(
            backward_body,
            absent=(),
            whole={"saved": self._saved_in(saved), "dfinal": dfinal},
            outputs={
                "du": self._like("u"),
                "ddelta": self._like("delta"),
                "dz": self._like("z"),
                "dBC": self._out(
                    *(rows, tiles, parts, groups, form.tokens, 2 * form.group)
                ),
                "dA": self._out(rows, form.states, self.width),
                "dD": None if self.weights["D"] is None else one_a_channel,
                "dbias": None if self.weights["bias"] is None else one_a_channel,
                "dinitial": self._out(rows, form.states, self.width),
            },
            scratch=_backward_scratch(form.chunk, form.states, form.group, form.tokens),
            backwards=True,
        )


def _one_cut_then_another(one, other):
    """Two cuts as one: a decay, whether the state is dropped, what is added."""
    decay, dropped, added = one
    decay_after, dropped_after, added_after = other
    left = jnp.where(dropped_after, 0.0, decay_after * added)
    return decay * decay_after, dropped | dropped_after, left + added_after
