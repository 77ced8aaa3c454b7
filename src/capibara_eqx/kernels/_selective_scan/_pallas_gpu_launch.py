"""How a kernel body meets its operands, on a GPU and in interpret mode.

A body is written once, against references, and started in one of two ways. On a GPU
it is the step of a `plgpu.emit_pipeline` inside a `plgpu.kernel`: one block of threads
walks along the sequence while the copy engine fetches the blocks of the next step.
Elsewhere the interpreter of `pl.pallas_call` runs it, which knows neither pipelines
nor barriers and needs neither.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped


# Threads of a warpgroup, and so channels of a block.
LANES = 128


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
    zeros: Callable[[], Any]


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

    def zeros():
        return jnp.zeros(LANES, jnp.float32)

    def kernel(*refs):
        step = pl.program_id(2)
        ends = (step == 0, step == job.grid[2] - 1)
        chunk = _chunk(job, step)
        tile, row = pl.program_id(0), pl.program_id(1)
        place = Place(row, tile, chunk, *ends, sync=lambda: None, zeros=zeros)
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

    def zeros():
        layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
        return plgpu.layout_cast(jnp.zeros(LANES, jnp.float32), layout)

    def kernel(*refs):
        row, tile = jax.lax.axis_index("row"), jax.lax.axis_index("tile")

        def step(indices, *streamed_refs):
            (index,) = indices
            ends = (index == 0, index == job.grid[2] - 1)
            chunk, sync = _chunk(job, index), plgpu.commit_smem
            place = Place(row, tile, chunk, *ends, sync=sync, zeros=zeros)
            body(place, streamed_refs, refs[len(streams) :])
            # No thread may still be reading a block when the next is copied over it.
            plgpu.commit_smem()

        def spec(stream):
            def index(step):
                return stream.index(tile, row, _chunk(job, step))

            return pl.BlockSpec(stream.block, index)

        plgpu.emit_pipeline(
            step,
            grid=job.grid[2:],
            in_specs=[spec(stream) for stream in streams],
            max_concurrent_steps=job.stages,
        )(*refs[: len(streams)])

    return plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=[plgpu.SMEM(s.shape, s.dtype) for s in scratch.values()],
        grid=job.grid[:2],
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
