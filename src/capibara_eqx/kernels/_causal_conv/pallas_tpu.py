"""The depthwise causal convolution for TPUs: Pallas on Mosaic.

What is read once from main memory per direction is each stream, what is written once
each result. The backward kernel computes the convolution again rather than to keep it,
and sums the cotangents of the weights over the tokens of a row.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._pallas_tpu import LANES, VMEM, Job, launch, up
from ._operands import Operands
from ._pallas_tpu_body import backward_body, forward_body
from ._pallas_tpu_launch import (
    Cut,
    Form,
    cut_for,
    layouts,
    seen_by,
    sees,
    vmem_bytes,
)


_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))

# Every tap is code of its own.
_WIDTH = 32


def unavailable() -> str | None:
    """Why it cannot run on this machine's TPU, or `None`."""
    return None


def refusal(operands: Operands, dilation: int, silu: bool) -> str | None:
    """Why these operands cannot be served, or `None`."""
    del silu
    if 0 in (*operands.x.shape, *operands.weight.shape):
        return "there is nothing to convolve"
    width = operands.weight.shape[-1]
    if width > _WIDTH:
        return f"it takes kernels of width {_WIDTH} at most, not {width}"
    for name in ("x", "weight", "bias", "history"):
        value = getattr(operands, name)
        if value is not None and value.dtype not in _DTYPES:
            names = " or ".join(str(dtype) for dtype in _DTYPES)
            return f"`{name}` must be {names}, not {value.dtype}"
    _, seq, channels = operands.x.shape
    needed = vmem_bytes(cut_for(seq, channels, width, dilation), width, dilation)
    if needed > VMEM:
        return (
            f"taps that reach {(width - 1) * dilation} tokens back take "
            f"{needed // 1024} KiB of VMEM, of which there are {VMEM // 1024}"
        )
    return None


def forward(
    operands: Operands,
    dilation: int,
    silu: bool,
    *,
    interpret: bool = False,
    cut: Cut | None = None,
) -> Float[Array, "rows seq channels"]:
    """The convolution, and SiLU of it if `silu`.

    **Arguments:**

    - `operands`, `dilation`, `silu`: see `_operands`.
    - `interpret`: run the kernel's interpreter, on any platform.
    - `cut`: how to cut the work, if not as `cut_for` says.
    """
    form = _form_of(operands, dilation, silu, cut, backwards=False)
    job = Job(
        body=functools.partial(forward_body, form),
        grid=form.grid,
        layout=layouts(form).__getitem__,
        inputs=_inputs(form, operands),
        outputs={"y": operands.x.dtype},
        scratch=_scratch(form, operands),
        interpret=interpret,
    )
    return launch(job)["y"]


def backward(
    operands: Operands,
    dy: Float[Array, "rows seq channels"],
    dilation: int,
    silu: bool,
    *,
    interpret: bool = False,
    cut: Cut | None = None,
) -> Operands:
    """The cotangents of all operands but `document`, from that of the result.

    **Arguments:**

    - `operands`, `dilation`, `silu`, `interpret`, `cut`: as of `forward`.
    - `dy`: the cotangent of `forward`'s result.
    """
    form = _form_of(operands, dilation, silu, cut, backwards=True)
    x, weight, bias, history, document = operands
    documents = (None, None) if document is None else seen_by(form, document)
    kept = form.halo + (form.lag + 1) * form.span
    job = Job(
        body=functools.partial(backward_body, form),
        grid=form.grid,
        layout=layouts(form).__getitem__,
        inputs={
            **_inputs(form, operands),
            **dict(zip(("seen_by", "history_seen_by"), documents, strict=True)),
            "dy": dy,
        },
        outputs={
            "dx": x.dtype,
            "dhistory": history.dtype if form.reach else None,
            "dweight": jnp.float32,
            "dbias": None if bias is None else jnp.float32,
        },
        scratch={
            **_scratch(form, operands),
            "cotangents": (kept, form.tile),
            "sums": (form.width + (bias is not None), 8, form.tile),
        },
        interpret=interpret,
    )
    out = launch(job)
    before = form.halo - form.reach
    return Operands(
        x=out["dx"],
        weight=out["dweight"].swapaxes(1, 2).astype(weight.dtype),
        bias=None if bias is None else out["dbias"][:, 0].astype(bias.dtype),
        history=out["dhistory"][:, before:] if form.reach else history,
        document=None,
    )


def _form_of(operands, dilation, silu, cut, *, backwards):
    (rows, seq, channels), (groups, _, width) = operands.x.shape, operands.weight.shape
    span, tile = cut or cut_for(seq, channels, width, dilation)
    return Form(
        rows=rows,
        rows_per_weights=rows // groups,
        seq=seq,
        span=span,
        channels=channels,
        tile=tile,
        width=width,
        dilation=dilation,
        silu=silu,
        backwards=backwards,
    )


def _inputs(
    form: Form, operands: Operands
) -> Mapping[str, Shaped[Array, "..."] | None]:
    x, weight, bias, history, document = operands
    before = form.halo - form.reach
    # As exact as in the XLA form, which reads both in the dtype of `x`.
    history = jnp.pad(history.astype(x.dtype), ((0, 0), (before, 0), (0, 0)))
    return {
        "x": x,
        "weight": weight.swapaxes(1, 2).astype(jnp.float32),
        "bias": None if bias is None else bias[:, None].astype(jnp.float32),
        "history": history if form.reach else None,
        "sees": None if document is None else sees(form, document),
    }


def _scratch(form: Form, operands: Operands) -> dict[str, Any]:
    rows = up(max(form.span, form.halo), LANES)
    has_documents = operands.document is not None
    return {
        "inputs": (form.halo + form.span, form.tile),
        "column": (rows, LANES) if has_documents else None,
    }
