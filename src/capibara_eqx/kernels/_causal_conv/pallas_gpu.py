"""The depthwise causal convolution for NVIDIA GPUs: Pallas on Mosaic GPU.

Every input is read once from global memory and every result written once, but for the
few tokens that two neighbouring blocks both see. The backward kernel computes the
convolution again rather than to keep it, and sums the cotangents of the weights over
the tokens of a block; the sum over blocks is taken outside, in a fixed order.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._pallas_gpu_launch import LANES, Launch, launch, struct_like, unavailable
from ._operands import Operands
from ._pallas_gpu_body import Form, backward_body, forward_body


_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))

# A run with its halo has to fit in the 255 registers of a thread, and should take half
# of them. Going backward the halo is of twice the tokens, and of cotangents as well.
_WIDTH = 8
_FORWARD_TOKENS = 16
_BACKWARD_TOKENS = 8

# Blocks that keep a Hopper chip busy: four for each of its 132 processors. Going
# backward a block takes several runs if there are more: it then has its halo in the
# first cache, and there are fewer sums to add up.
_BLOCKS = 528
_RUNS = 16


class Tiles(NamedTuple):
    """How the work is cut; chosen by `tiles_for` unless given."""

    lanes: int  # channels of a block, one or two a thread
    tokens: int  # in registers at a time
    runs: int  # that a block takes one after the other


def refusal(operands: Operands, dilation: int, silu: bool) -> str | None:
    """Why these operands cannot be served, or `None`."""
    del dilation, silu
    reason = unavailable()
    if reason is not None:
        return reason
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
    return None


def tiles_for(operands: Operands, dilation: int, *, backwards: bool) -> Tiles:
    """Two channels a thread where that pads nothing, and runs without padding.

    Not tuned: no measurement on a GPU stands behind the numbers. Behind the tokens of
    a run does what the compiler says for `sm_90a`: with a width of 4, forward takes 92
    to 159 registers a thread, backward 119 to 144, but 225 to 255 with documents; none
    spills. Of a width of 8 with documents backward spills 20 bytes.
    """
    rows, seq, channels = operands.x.shape
    lanes = LANES if _ceil(channels, LANES) % 2 else 2 * LANES
    steps = _ceil(seq, dilation)
    tokens = _part(steps, _BACKWARD_TOKENS if backwards else _FORWARD_TOKENS)
    if not backwards:
        return Tiles(lanes, tokens, 1)
    runs = _ceil(steps, tokens)
    blocks = _ceil(channels, lanes) * rows * dilation * runs
    return Tiles(lanes, tokens, _part(runs, min(_RUNS, max(1, blocks // _BLOCKS))))


def _part(size, most):
    """The largest number up to `most` that cuts `size` evenly, if there is a large one.

    If not, that of the fewest parts which are as even as can be.
    """
    if size <= most:
        return size
    whole = (n for n in range(most, most // 2, -1) if size % n == 0)
    return next(whole, _ceil(size, _ceil(size, most)))


def forward(
    operands: Operands,
    dilation: int,
    silu: bool,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "rows seq channels"]:
    """The convolution, and SiLU of it if `silu`.

    **Arguments:**

    - `operands`, `dilation`, `silu`: see `_operands`.
    - `interpret`: run the kernel's interpreter, on any platform.
    - `tiles`: how to cut the work, if not as `tiles_for` says.
    """
    work = _Work(operands, dilation, silu, tiles, interpret)
    out = work.launch(forward_body, {}, {"y": work.like("x")})
    return out["y"][..., : operands.x.shape[-1]]


def backward(
    operands: Operands,
    dy: Float[Array, "rows seq channels"],
    dilation: int,
    silu: bool,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Operands:
    """The cotangents of all operands but `document`, from that of the result.

    **Arguments:**

    - `operands`, `dilation`, `silu`, `interpret`, `tiles`: as of `forward`.
    - `dy`: the cotangent of `forward`'s result.
    """
    x, weight, bias, history, _ = operands
    work = _Work(operands, dilation, silu, tiles, interpret, dy)
    rows, width, channels = x.shape[0], weight.shape[-1], x.shape[-1]
    sums = (rows, work.form.chunks, width + (bias is not None), work.channels)
    outputs = {
        "dx": work.like("x"),
        "dhistory": work.like("history"),
        "dweight": work.struct(sums, jnp.float32),
    }
    out = work.launch(backward_body, {"dy": work.padded(dy)}, outputs)
    dweights = jnp.sum(out["dweight"], axis=1)[..., :channels]
    dhistory = out["dhistory"]
    return Operands(
        x=out["dx"][..., :channels],
        weight=dweights[:, :width].swapaxes(1, 2).astype(weight.dtype),
        bias=None if bias is None else dweights[:, width].astype(bias.dtype),
        history=history if dhistory is None else dhistory[..., :channels],
        document=None,
    )


def _ceil(size, part):
    return -(-size // part)


class _Work:
    """One call: the operands, padded to whole tiles of channels, and their kernels."""

    def __init__(
        self,
        operands: Operands,
        dilation: int,
        silu: bool,
        tiles: Tiles | None,
        interpret: bool,
        dy: Float[Array, "rows seq channels"] | None = None,
    ):
        x, weight, bias, history, document = operands
        (rows, seq, channels), width = x.shape, weight.shape[-1]
        if tiles is None:
            tiles = tiles_for(operands, dilation, backwards=dy is not None)
            if interpret:
                # It gains nothing from more, and XLA would have to compile them.
                tokens = min(tiles.tokens, max(2, width - 1))
                tiles = Tiles(LANES, tokens, min(tiles.runs, 2))
        self.channels = _ceil(channels, tiles.lanes) * tiles.lanes
        self.form = Form(
            seq=seq,
            width=width,
            dilation=dilation,
            silu=silu,
            lanes=tiles.lanes,
            tokens=tiles.tokens,
            runs=tiles.runs,
            rows_per_weights=rows // weight.shape[0],
        )
        self.rows, self.interpret = rows, interpret
        arrays = [value for value in (*operands, dy) if value is not None]
        self.struct = struct_like(arrays)
        self.arrays = {
            "x": self.padded(x),
            "weight": self.padded(weight.swapaxes(1, 2)),
            "bias": None if bias is None else self.padded(bias),
            "history": self.padded(history) if history.size else None,
            "document": None if document is None else document.astype(jnp.int32),
        }

    def padded(self, values):
        extra = self.channels - values.shape[-1]
        if not extra:
            return values
        return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, extra)])

    def like(self, name):
        values = self.arrays[name]
        return None if values is None else self.struct(values.shape, values.dtype)

    def launch(self, body, more, outputs) -> dict[str, Any]:
        job = Launch(
            name="causal_conv_" + body.__name__.removesuffix("_body"),
            body=functools.partial(body, self.form),
            grid=(self.channels // self.form.lanes, self.rows, self.form.chunks),
            streams={},
            whole={**self.arrays, **more},
            outputs=outputs,
            scratch={},
            backwards=False,
            stages=1,
        )
        return launch(job, interpret=self.interpret)
