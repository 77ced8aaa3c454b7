"""How a kernel body meets its operands, on a GPU and in interpret mode.

A body is written once, against references, and started in one of two ways. On a GPU
it is the step of a `plgpu.emit_pipeline` inside a `plgpu.kernel`: one block of threads
walks along the sequence while the copy engine fetches the blocks of the next step. A
body without streams has nothing to walk along; then every step is a block of its own.
Elsewhere the interpreter of `pl.pallas_call` runs it, which knows neither pipelines
nor barriers and needs neither.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped


# Threads of a warpgroup, and so channels of a block, or a divisor of them.
LANES = 128

# `plgpu.kernel` calls its arguments by other names in older versions.
_OLDEST_JAX = (0, 10, 2)
_HOPPER = 9.0


def unavailable() -> str | None:
    """Why no kernel of this kind can run on this machine, or `None`.

    Where jax runs on something else a kernel can still be lowered and interpreted.
    """
    if jax.__version_info__ < _OLDEST_JAX:
        oldest = ".".join(map(str, _OLDEST_JAX))
        return f"it needs jax {oldest} or newer, not {jax.__version__}"
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    try:
        new_enough = float(capability) >= _HOPPER
    except ValueError:
        # Chips of other makers have names there.
        new_enough = False
    if new_enough:
        return None
    return (
        "it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer, and this "
        f"one, {device.device_kind}, has {capability}"
    )


def struct_like(
    arrays: Sequence[Shaped[Array, "..."]],
) -> Callable[..., jax.ShapeDtypeStruct]:
    """`jax.ShapeDtypeStruct`, varying over the mesh axes that any array varies over.

    Inside `jax.shard_map` a kernel's outputs must say so themselves.
    """
    types = [jax.typeof(x).manual_axis_type for x in arrays]
    varying = frozenset().union(*(kind.varying for kind in types))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return functools.partial(jax.ShapeDtypeStruct, manual_axis_type=kind)


class Place(NamedTuple):
    """Where in the grid a body runs, and what it may ask of the machine there."""

    row: Any
    tile: Any
    chunk: Any
    first: Any
    last: Any
    # Makes what all threads of the block wrote to shared memory visible to all.
    sync: Callable[[], None]
    # Zeros that may enter a loop, of which Mosaic asks to be spread over the threads.
    zeros: Callable[..., Any]
    # For matrices whose axes can be summed along, which Mosaic spreads over the threads
    # otherwise than plain vectors. `axes` are those of the matrix that an array has:
    # an array as such, `spread(x, axes)`; from and to global memory, `load(ref, at,
    # axes)` and `store(ref, at, x)`.
    spread: Callable[[Any, tuple[int, ...]], Any]
    load: Callable[[Any, tuple[Any, ...], tuple[int, ...]], Any]
    store: Callable[[Any, tuple[Any, ...], Any], None]


class Stream(NamedTuple):
    """An operand that is read block by block along the sequence."""

    array: Shaped[Array, "..."]
    block: tuple[int | None, ...]
    index: Callable[..., tuple[Any, ...]]


class Launch(NamedTuple):
    """A body and the shape of its work. Absent operands and outputs are `None`.

    The body is called with a `Place` and, by name, a reference for every stream (its
    current block, in shared memory), every whole operand and output (all of it, in
    global memory) and every scratch (shared memory that lives as long as a row does);
    the name of the reference is that of the operand with `_ref` behind it.
    """

    name: str  # for profilers
    body: Callable[..., None]
    grid: tuple[int, int, int]  # tiles of channels, rows, chunks
    streams: Mapping[str, Stream | None]
    whole: Mapping[str, Shaped[Array, "..."] | None]
    outputs: Mapping[str, jax.ShapeDtypeStruct | None]
    scratch: Mapping[str, jax.ShapeDtypeStruct | None]
    backwards: bool
    stages: int


def launch(job: Launch, *, interpret: bool) -> dict[str, Any]:
    """Run a kernel; the outputs by name, absent ones `None`."""
    streams = {k: v for k, v in job.streams.items() if v is not None}
    whole = {k: v for k, v in job.whole.items() if v is not None}
    outputs = {k: v for k, v in job.outputs.items() if v is not None}
    scratch = {k: v for k, v in job.scratch.items() if v is not None}
    groups = (job.streams, job.whole, job.outputs, job.scratch)
    absent = {k: None for group in groups for k, v in group.items() if v is None}

    def body(place, streamed_refs, other_refs):
        names = [*streams, *whole, *outputs, *scratch]
        refs = dict(zip(names, [*streamed_refs, *other_refs], strict=True))
        job.body(place, **{f"{k}_ref": ref for k, ref in {**absent, **refs}.items()})

    run = _interpreted if interpret else _compiled
    arrays = [*(s.array for s in streams.values()), *whole.values()]
    out = run(job, body, list(streams.values()), len(whole), outputs, scratch)(*arrays)
    return {**dict.fromkeys(job.outputs), **dict(zip(outputs, out, strict=True))}


def _chunk(job, step):
    return job.grid[2] - 1 - step if job.backwards else step


def _interpreted(job, body, streams, wholes, outputs, scratch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def zeros(count=LANES):
        return jnp.zeros(count, jnp.float32)

    def store(ref, at, x):
        ref[at] = x

    def kernel(*refs):
        step = pl.program_id(2)
        place = Place(
            row=pl.program_id(1),
            tile=pl.program_id(0),
            chunk=_chunk(job, step),
            first=step == 0,
            last=step == job.grid[2] - 1,
            sync=lambda: None,
            zeros=zeros,
            spread=lambda x, axes: x,
            load=lambda ref, at, axes: ref[at],
            store=store,
        )
        body(place, refs[: len(streams)], refs[len(streams) :])

    def spec(stream):
        def index(tile, row, step):
            return stream.index(tile, row, _chunk(job, step))

        return pl.BlockSpec(stream.block, index)

    return pl.pallas_call(
        kernel,
        grid=job.grid,
        in_specs=[*map(spec, streams), *[pl.BlockSpec()] * wholes],
        out_specs=[pl.BlockSpec()] * len(outputs),
        out_shape=list(outputs.values()),
        scratch_shapes=[plgpu.SMEM(s.shape, s.dtype) for s in scratch.values()],
        interpret=True,
    )


def _compiled(job, body, streams, wholes, outputs, scratch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    del wholes
    tiles, rows, chunks = job.grid

    def walk(*refs):
        row, tile = jax.lax.axis_index("row"), jax.lax.axis_index("tile")

        def step(indices, *streamed_refs):
            (index,) = indices
            ends = (index == 0, index == chunks - 1)
            place = _place_on_gpu(row, tile, _chunk(job, index), *ends)
            body(place, streamed_refs, refs[len(streams) :])
            # No thread may still be reading a block when the next is copied over it.
            plgpu.commit_smem()

        def spec(stream):
            def index(step):
                return stream.index(tile, row, _chunk(job, step))

            return pl.BlockSpec(stream.block, index)

        plgpu.emit_pipeline(
            step,
            grid=(chunks,),
            in_specs=[spec(stream) for stream in streams],
            max_concurrent_steps=job.stages,
        )(*refs[: len(streams)])

    def one_step(*refs):
        index, tile = jax.lax.axis_index("row"), jax.lax.axis_index("tile")
        # Typed, lest they have 64 bits where those are enabled.
        row = jax.lax.div(index, np.int32(chunks))
        chunk = jax.lax.rem(index, np.int32(chunks))
        ends = (chunk == 0, chunk == chunks - 1)
        body(_place_on_gpu(row, tile, chunk, *ends), (), refs)

    kernel = walk if streams else one_step
    kernel.__name__ = job.name
    return plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=[plgpu.SMEM(s.shape, s.dtype) for s in scratch.values()],
        # The last axis is the one that CUDA lets grow beyond 65535.
        grid=(tiles, rows if streams else rows * chunks),
        grid_names=("tile", "row"),
        compiler_params=plgpu.CompilerParams(
            # `exp2` is one instruction of the special function unit, right to 2 ulp.
            approx_math=True,
            # Every thread reads back only what it wrote itself, but where a body says
            # `sync`: the barriers around each store would cost more than the stores.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _place_on_gpu(row, tile, chunk, first, last):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def zeros(count=LANES):
        # As Mosaic spreads what it loads.
        strided = plgpu.Layout.WG_STRIDED((count,), vec_size=count // LANES)
        return plgpu.layout_cast(jnp.zeros(count, jnp.float32), strided)

    def layout(axes):
        matrix = plgpu.Layout.WGMMA
        return matrix if axes == (0, 1) else matrix.reduce(1 - axes[0])

    # Rows of the matrix may be shorter than a line of the cache. Mosaic refuses to load
    # or store such a one unless told that this is meant; it cannot know that all of the
    # line is wanted, by other warps.
    def load(ref, at, axes):
        options = {"layout": layout(axes), "optimized": False}
        if "idx" in inspect.signature(plgpu.load).parameters:  # jax 0.10
            options["idx"] = ()
        return plgpu.load(ref.at[at], **options)

    def store(ref, at, x):
        unoptimized = getattr(plgpu, "store", None)
        if unoptimized is None:  # jax 0.10, which refuses nothing here
            ref[at] = x
        else:
            unoptimized(ref.at[at], x, optimized=False)

    return Place(
        row=row,
        tile=tile,
        chunk=chunk,
        first=first,
        last=last,
        sync=plgpu.commit_smem,
        zeros=zeros,
        spread=lambda x, axes: plgpu.layout_cast(x, layout(axes)),
        load=load,
        store=store,
    )
