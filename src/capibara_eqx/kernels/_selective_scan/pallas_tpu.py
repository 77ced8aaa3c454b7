"""The fused selective scan for TPUs: Pallas on Mosaic.

What is read once from main memory per direction is each stream, what is written once
each result; states pass through it only where a chunk begins, and only if asked for.

A single token, as in generating, has a kernel of its own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._pallas_tpu import GROUP, LANES, VMEM
from ._operands import Operands
from ._pallas_tpu_backward import Rows, backward_body
from ._pallas_tpu_forward import forward_body
from ._pallas_tpu_launch import (
    flags,
    form_of,
    from_partial,
    launch,
    narrow,
    span_of,
    vmem_bytes,
)
from ._pallas_tpu_step import step
from ._tuning import Sizes


_STREAMS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def unavailable() -> str | None:
    """Why it cannot run on this machine's TPU, or `None`."""
    return None


def refusal(operands: Operands, sizes: Sizes) -> str | None:
    """Why these operands cannot be served, or `None`."""
    chunk = sizes.chunk
    (_, seq, d_inner), d_state = operands.u.shape, operands.A.shape[-1]
    if 0 in (*operands.u.shape, *operands.A.shape):
        return "there is nothing to scan"
    if chunk < 1 or (chunk < seq and chunk % GROUP):
        return (
            f"its chunk must be a multiple of {GROUP}, or the whole of {seq} tokens, "
            f"not {chunk}"
        )
    for name, value in operands._asdict().items():
        if value is None or name == "reset":
            continue
        allowed = _STREAMS if name in ("u", "delta", "B", "C", "z") else _STREAMS[:1]
        if value.dtype == jnp.float64:
            return f"`{name}` is float64, which is not an arithmetic of a TPU"
        if value.dtype not in allowed:
            names = " or ".join(str(dtype) for dtype in allowed)
            return f"`{name}` must be {names}, not {value.dtype}"
    needed = vmem_bytes(min(d_inner, LANES), d_state, span_of(seq, chunk))
    if needed > VMEM:
        return (
            f"{d_state} states a channel and chunks of {min(chunk, seq)} take "
            f"{needed // 1024} KiB of VMEM, of which there are {VMEM // 1024}"
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
        # Not padded to a group of tokens, nor a step of the grid for every row.
        return *step(operands, softplus, interpret=interpret), None
    form = form_of(operands, softplus, sizes, backwards=False, interpret=interpret)
    out = launch(
        form,
        forward_body,
        {**_inputs(form, operands), "initial": _state_in(operands.initial_state)},
        {
            "y": operands.u.dtype,
            "final": jnp.float32,
            "saved": jnp.float32 if save else None,
        },
        {
            "state": (form.d_state, form.tile),
            **dict.fromkeys(("dt_row", "x_row", "y_row"), (GROUP, form.tile)),
        },
    )
    return out["y"], _state_out(out["final"]), out["saved"]


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
    form = form_of(operands, softplus, sizes, backwards=True, interpret=interpret)
    u, delta, _, B, C, D, z, delta_bias, initial_state, _ = operands

    def sums(operand):
        return None if operand is None else jnp.float32

    out = launch(
        form,
        backward_body,
        {
            **_inputs(form, operands),
            **{"saved": saved, "dy": dy, "dfinal": _state_in(dfinal_state)},
        },
        {
            **{"du": u.dtype, "ddelta": delta.dtype, "dz": z if z is None else z.dtype},
            **dict.fromkeys(("dB", "dC", "dA"), jnp.float32),
            **{"dD": sums(D), "dbias": sums(delta_bias)},
            "dinitial": sums(initial_state),
        },
        {
            "adjoint": (form.d_state, form.tile),
            "decayed": (form.span, form.d_state, form.tile),
            **{f"{name}_row": (GROUP, form.tile) for name in Rows._fields},
        },
    )
    return Operands(
        u=out["du"],
        delta=out["ddelta"],
        A=_state_out(out["dA"]),
        B=from_partial(form, out["dB"]).astype(B.dtype),
        C=from_partial(form, out["dC"]).astype(C.dtype),
        D=None if D is None else out["dD"][:, 0],
        z=out["dz"],
        delta_bias=None if delta_bias is None else out["dbias"][:, 0],
        initial_state=None if initial_state is None else _state_out(out["dinitial"]),
        reset=None,
    )


def _inputs(form, operands):
    u, delta, A, B, C, D, z, delta_bias, _, reset = operands
    return {
        **{"u": u, "delta": delta, "z": z, "A": _state_in(A)},
        **{"B": narrow(form, B), "C": narrow(form, C)},
        "D": None if D is None else D[:, None],
        "bias": None if delta_bias is None else delta_bias[:, None],
        "reset": None if reset is None else flags(form, reset),
    }


# Outside of the kernel the states of a channel are neighbours, inside the channels.


def _state_in(x):
    return None if x is None else x.swapaxes(1, 2)


def _state_out(x):
    return x.swapaxes(1, 2)
