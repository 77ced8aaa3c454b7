"""The fused selective scan for NVIDIA GPUs: Pallas on Mosaic GPU (Hopper or newer).

What is read once from global memory per direction is each stream, what is written once
each result; states pass through it only where a chunk begins, and only if asked for.

A row and 128 of its channels are one block's work, which fills a chip of 132 processors
only if there are many of both. If not, each row is cut along the sequence: a first pass
finds what every cut adds to the state, `Work.states_between` joins the cuts, and the
kernel proper runs on all of them at once. That reads some streams twice, and pays where
it gives the kernel three or more times the blocks.

A single token, as in generating, has a kernel of its own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._pallas_gpu_launch import unavailable
from ._operands import Operands
from ._pallas_gpu_step import step
from ._pallas_gpu_work import SHARED, Work, shared_bytes, tiles_for
from ._tuning import Sizes


_STREAMS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def refusal(operands: Operands, sizes: Sizes) -> str | None:
    """Why these operands cannot be served, or `None`."""
    reason, chunk = unavailable(), sizes.chunk
    if reason is not None:
        return reason
    if chunk % 8 or not 0 < chunk <= 256:
        return f"its chunk must be a multiple of 8 up to 256, not {chunk}"
    if 0 in (*operands.u.shape, *operands.A.shape):
        return "there is nothing to scan"
    for name, value in operands._asdict().items():
        if value is None or name == "reset":
            continue
        allowed = _STREAMS if name in ("u", "delta", "B", "C", "z") else _STREAMS[:1]
        if value.dtype not in allowed:
            names = " or ".join(str(dtype) for dtype in allowed)
            return f"`{name}` must be {names}, not {value.dtype}"
    tiles = tiles_for(operands, sizes)
    needed = shared_bytes(operands, chunk, tiles.group, tiles.stages)
    if needed > SHARED:
        states = operands.A.shape[-1]
        return (
            f"{states} states a channel and chunks of {chunk} take {needed // 1024} KiB"
            f" of shared memory, of which there are {SHARED // 1024}"
        )
    return None


def forward(
    operands: Operands,
    softplus: bool,
    sizes: Sizes,
    save: bool,
    *,
    interpret: bool = False,
) -> tuple[
    Float[Array, "rows seq d_inner"],
    Float[Array, "rows d_inner d_state"],
    Float[Array, "rows chunks d_state d_inner"] | None,
]:
    """`y`, the final state and, if asked to `save`, the states entering each chunk.

    **Arguments:**

    - `operands`: the arguments of the scan.
    - `softplus`: whether step sizes pass through softplus.
    - `sizes`: how the work is cut.
    - `save`: whether to return those.
    - `interpret`: run the kernel's interpreter, on any platform.
    """
    if operands.u.shape[1] == 1 and not save:
        # Not padded to a chunk of tokens, nor the states turned round.
        return *step(operands, softplus, interpret=interpret), None
    work = Work(operands, softplus, sizes, interpret)
    initial = operands.initial_state
    initial = None if initial is None else work.state_in(initial)
    if work.splits > 1:
        out = work.forward(None, states_only=True)
        if initial is None:
            initial = jnp.zeros_like(out["final"][:: work.splits])
        cuts = (out["final"], out["elapsed"])
        initial = work.states_between(initial, *cuts, backwards=False)
    out = work.forward(initial, save=save)
    saved = work.saved_out(out["saved"]) if save else None
    return work.wide_out(out["y"]), work.state_out(out["final"], -1), saved


def backward(
    operands: Operands,
    saved: Float[Array, "rows chunks d_state d_inner"],
    dy: Float[Array, "rows seq d_inner"],
    dfinal_state: Float[Array, "rows d_inner d_state"],
    softplus: bool,
    sizes: Sizes,
    *,
    interpret: bool = False,
) -> Operands:
    """The cotangents of all operands but `reset`, from those of `forward`'s results.

    **Arguments:**

    - `operands`, `softplus`, `sizes`, `interpret`: as of `forward`.
    - `saved`: the states entering each chunk, from `forward`.
    - `dy`, `dfinal_state`: the cotangents of `y` and of the final state.
    """
    work = Work(operands, softplus, sizes, interpret, dy)
    dfinal = work.state_in(dfinal_state)
    if work.splits > 1:
        nothing = jnp.zeros_like(jnp.repeat(dfinal, work.splits, axis=0))
        out = work.adjoint(nothing)
        cuts = (out["dinitial"], out["elapsed"])
        dfinal = work.states_between(dfinal, *cuts, backwards=True)
    out = work.backward(saved, dfinal)
    dB, dC = work.sums_over_channels(out["dBC"])
    dinitial = None
    if operands.initial_state is not None:
        dinitial = work.state_out(out["dinitial"], 0)
    return Operands(
        u=work.wide_out(out["du"]),
        delta=work.wide_out(out["ddelta"]),
        A=work.per_row(out["dA"]).transpose(0, 2, 1),
        B=dB.astype(operands.B.dtype),
        C=dC.astype(operands.C.dtype),
        D=None if operands.D is None else work.per_row(out["dD"]),
        z=None if operands.z is None else work.wide_out(out["dz"]),
        delta_bias=None if operands.delta_bias is None else work.per_row(out["dbias"]),
        initial_state=dinitial,
        reset=None,
    )
