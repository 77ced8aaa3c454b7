"""What the TPU kernels of all operations share: limits, and how one is started."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Shaped

from ._carry import type_of


# What a kernel may take of VMEM: compilers allow 16 MiB, also on chips that have more.
VMEM = 15 * 2**20

# Tokens that are read and written together: one tile of bfloat16, two of float32.
GROUP = 16

LANES = 128


def up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not less than `size`."""
    return -(-size // multiple) * multiple


def loop(count, body, carry=None, *, unroll=False):
    """`jax.lax.fori_loop` from 0 to `count`."""
    return jax.lax.fori_loop(0, count, body, carry, unroll=count if unroll else 1)


def sigmoid(x):
    return 1.0 / (1.0 + jnp.exp(-x))


class Layout(NamedTuple):
    """The shape of a whole array, of its blocks, and which block a grid step has."""

    shape: tuple[int, ...]
    block: tuple[int | None, ...]
    index: Callable[[Any, Any, Any], tuple[Any, ...]]
    scalar: bool = False


class Job(NamedTuple):
    """A kernel and its work.

    **Attributes:**

    - `body`: takes, by name with `_ref` behind it, a reference for the block of every
        input and output and for all of every scratch; `None` for those that are absent.
    - `grid`: only the steps of its last axis know what others left in the scratches.
    - `layout`: of an input or output, by its name.
    - `inputs`: the arrays, laid out as their names demand.
    - `outputs`: dtypes.
    - `scratch`: shapes, of float32.
    - `interpret`: whether to run the kernel's interpreter, on any platform.
    """

    body: Callable[..., None]
    grid: tuple[int, int, int]
    layout: Callable[[str], Layout]
    inputs: Mapping[str, Shaped[Array, "..."] | None]
    outputs: Mapping[str, DTypeLike | None]
    scratch: Mapping[str, tuple[int, ...] | None]
    interpret: bool


def launch(job: Job) -> dict[str, Any]:
    """Run a kernel; returns its outputs by name, `None` for absent ones."""
    arrays = {k: v for k, v in job.inputs.items() if v is not None}
    dtypes = {k: v for k, v in job.outputs.items() if v is not None}
    shapes = {k: v for k, v in job.scratch.items() if v is not None}
    names = [*arrays, *dtypes, *shapes]
    absent = {f"{k}_ref": None for k in (*job.inputs, *job.outputs, *job.scratch)}

    def kernel(*refs):
        refs = {f"{k}_ref": ref for k, ref in zip(names, refs, strict=True)}
        job.body(**{**absent, **refs})

    def spec(name):
        _, block, index, scalar = job.layout(name)
        return pl.BlockSpec(block, index, memory_space=pltpu.SMEM if scalar else None)

    anything = type_of(*arrays.values())
    call = pl.pallas_call(
        kernel,
        grid=job.grid,
        in_specs=[spec(name) for name in arrays],
        out_specs=[spec(name) for name in dtypes],
        out_shape=[
            anything.update(shape=job.layout(name).shape, dtype=jnp.dtype(dtype))
            for name, dtype in dtypes.items()
        ],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in shapes.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=job.interpret,
    )
    with _narrow_numbers():
        out = call(*arrays.values())
    return {**dict.fromkeys(job.outputs), **dict(zip(dtypes, out, strict=True))}


def _narrow_numbers() -> AbstractContextManager[None]:
    """A context in which a number without a dtype has 32 bits.

    An index of 64 bits, which it has if a user switched those on, fits no TPU.
    """
    # jax 0.8 moved the context manager to its top level.
    home = jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")
    return home.enable_x64(False)
