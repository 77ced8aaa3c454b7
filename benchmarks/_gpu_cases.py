"""What is measured on a GPU: operands, work to be done, and what results ought to be.

Streams are bfloat16, as in mixed precision, and references start from what they are
worth after that rounding. A reference in float64 of all channels would take minutes at
the sizes that fill a GPU. Channels know of each other only in the cotangents of B and
C, so a few of them are judged over all rows and tokens; the cotangent of B is judged at
the last tokens of every row, where it depends on no earlier one, and that of C at the
first, where it depends on no later one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from capibara_eqx.kernels import causal_conv, selective_scan
from capibara_eqx.kernels._causal_conv.specs import Spec as ConvSpec
from capibara_eqx.kernels._selective_scan.specs import Spec as ScanSpec

from . import _oracle, _roofline
from ._inputs import normal, token_inputs
from ._roofline import Work


FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"
SCAN, CONV, STEP = "gpu_selective_scan", "gpu_causal_conv", "gpu_selective_scan_step"

_BFLOAT16 = np.dtype(jnp.bfloat16)
# The fewest states that the fused kernel could keep: its longest chunk has 256 tokens.
_SAVED_EVERY = 256
# How much is judged.
_CHANNELS, _TOKENS = 32, 32


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    - `function(implementation)`: of `arguments`, the timed operation.
    - `cotangent`: of its result, `None` if it has no modes but its own.
    - `work`: of each mode, the passes one after the other.
    - `judged(mode, results)`: the part of the results that is compared.
    - `expected(mode)`: the same part in float64.
    """

    operation: str
    spec: dict[str, Any]
    function: Callable[[str], Callable[..., Any]]
    arguments: tuple[np.ndarray, ...]
    cotangent: np.ndarray | None
    work: dict[str, tuple[Work, ...]]
    judged: Callable[[str, Any], Any]
    expected: Callable[[str], Any]


def scan_case(spec: ScanSpec) -> Case:
    """The scan as a Mamba layer calls it: softplus, bias, skip weights and gate."""
    batch, seq, d_inner, d_state = sizes = spec[1:]
    wide, narrow = (batch, seq, d_inner), (batch, seq, d_state)
    u, delta, z, B, C, dy = map(
        _narrow, normal(11, wide, wide, wide, narrow, narrow, wide)
    )
    # Weights as those of one token, in float32: steps of about 0.001 to 0.1.
    token = token_inputs(1, d_inner, d_state)
    A, D, bias = (np.ascontiguousarray(token[n]) for n in ("A", "D", "delta_bias"))
    arguments = (u, delta, A, B, C, D, z, bias)
    kept = partial(_roofline.scan_forward, *sizes, 2)
    backward = _roofline.scan_backward(*sizes, 2, _SAVED_EVERY)
    return Case(
        SCAN,
        spec._asdict(),
        _scan,
        arguments,
        dy,
        {
            FORWARD: (kept(0),),
            BACKWARD: (backward,),
            BOTH: (kept(_SAVED_EVERY), backward),
        },
        partial(_judged_scan, _some(d_inner)),
        partial(_expected_scan, _some(d_inner), arguments, dy),
    )


def _scan(implementation):
    def scan(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(
            *(u, delta, A, B, C, D),
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
            implementation=implementation,
        )[0]

    return scan


def _judged_scan(channels, mode, results):
    y, gradients = _parts(mode, results)
    if y is not None:
        y = y[..., channels]
    if gradients is not None:
        du, ddelta, dA, dB, dC, dD, dz, dbias = gradients
        gradients = (
            *(x[..., channels] for x in (du, ddelta, dz, dD, dbias)),
            dA[channels],
            dB[:, -_TOKENS:],
            dC[:, :_TOKENS],
        )
    return _whole(mode, y, gradients)


def _expected_scan(channels, arguments, dy, mode):
    u, delta, A, B, C, D, z, bias = arguments

    def gradients(tokens, channels):
        wide = [x[:, tokens, channels] for x in (u, delta, z, dy)]
        weights = [x[channels] for x in (A, D, bias)]
        inputs = (*wide, *weights, B[:, tokens], C[:, tokens])
        return gated_scan_gradients(*inputs)

    y, own, _ = gradients(slice(None), channels)
    if mode == FORWARD:
        return y
    *_, (dB, _) = gradients(slice(-_TOKENS, None), slice(None))
    *_, (_, dC) = gradients(slice(_TOKENS), slice(None))
    return _whole(mode, y, (*own, dB, dC))


def gated_scan_gradients(u, delta, z, dy, A, D, bias, B, C):
    """Of the scan with softplus, skip weights and gate, in float64.

    `y`; the cotangents of u, delta, z, D, the bias and A; and those of B and C.
    """
    u, delta, z, dy = (np.asarray(x, np.float64) for x in (u, delta, z, dy))
    steps = np.logaddexp(0.0, delta + bias)
    gate = 1 / (1 + np.exp(-z))
    scanned, (du, dsteps, dA, dB, dC, dD) = _oracle.selective_scan_gradients(
        u, steps, A, B, C, D, dy=dy * z * gate
    )
    # The slope of softplus is the sigmoid, 1 - exp(-softplus).
    ddelta = dsteps * -np.expm1(-steps)
    dz = dy * scanned * gate * (1 + z * (1 - gate))
    own = (du, ddelta, dz, dD, ddelta.sum((0, 1)), dA)
    return scanned * z * gate, own, (dB, dC)


def conv_case(spec: ConvSpec) -> Case:
    """The depthwise convolution with bias and SiLU, its weights in bfloat16 too."""
    batch, seq, channels, _, width, *_ = spec[1:]
    if (spec.groups, spec.c_out, spec.dilation) != (channels, channels, 1):
        raise ValueError(f"only depthwise convolutions are compared, not {spec}.")
    shape = (batch, seq, channels)
    x, dy, weight, bias = map(
        _narrow, normal(12, shape, shape, (channels, 1, width), (channels,))
    )
    arguments = (x, weight, bias)
    sizes = (batch, seq, channels, width, 2)
    passes = (_roofline.conv_forward(*sizes), _roofline.conv_backward(*sizes))
    return Case(
        CONV,
        spec._asdict(),
        _conv,
        arguments,
        dy,
        {FORWARD: passes[:1], BACKWARD: passes[1:], BOTH: passes},
        partial(_judged_conv, _some(channels)),
        partial(_expected_conv, _some(channels), arguments, dy),
    )


def _conv(implementation):
    def convolve(x, weight, bias):
        return causal_conv(
            *(x, weight, bias),
            activation="silu",
            groups=x.shape[-1],
            implementation=implementation,
        )[0]

    return convolve


def _judged_conv(channels, mode, results):
    y, gradients = _parts(mode, results)
    if y is not None:
        y = y[..., channels]
    if gradients is not None:
        dx, dweight, dbias = gradients
        gradients = (dx[..., channels], dweight[channels], dbias[channels])
    return _whole(mode, y, gradients)


def _expected_conv(channels, arguments, dy, mode):
    x, weight, bias = arguments
    own = (x[..., channels], weight[channels], bias[channels])
    before = _oracle.causal_conv(*own)
    gate = 1 / (1 + np.exp(-before))
    if mode == FORWARD:
        return before * gate
    dbefore = dy[..., channels] * gate * (1 + before * (1 - gate))
    _, gradients = _oracle.causal_conv_gradients(*own, dy=dbefore)
    return _whole(mode, before * gate, gradients)


def step_case(batch: int, d_inner: int, d_state: int) -> Case:
    """One token of the scan from a state of float32, as decoding calls it."""
    token = token_inputs(batch, d_inner, d_state)
    for name in ("u", "delta", "B", "C", "z"):
        token[name] = _narrow(token[name])
    spec = {"name": f"batch_{batch}", "batch": batch}
    spec |= {"d_inner": d_inner, "d_state": d_state}
    return Case(
        STEP,
        spec,
        partial(_step, list(token)),
        tuple(np.ascontiguousarray(x) for x in token.values()),
        None,
        {"step": (_roofline.scan_step(batch, d_inner, d_state, 2),)},
        lambda mode, results: results,
        lambda mode: _oracle.selective_scan_step(**token),
    )


def _step(names, implementation):
    def step(*values):
        token = dict(zip(names, values, strict=True))
        for name in ("u", "delta", "B", "C", "z"):
            token[name] = token[name][:, None]
        y, state = selective_scan(
            **token, delta_softplus=True, implementation=implementation
        )
        return y[:, 0], state

    return step


def _narrow(x: np.ndarray) -> np.ndarray:
    return x.astype(_BFLOAT16)


def _some(channels: int) -> np.ndarray:
    """Channels from the first to the last, so that every block has some."""
    return np.unique(np.linspace(0, channels - 1, _CHANNELS).astype(int))


def _parts(mode, results):
    """What is there of the value and the gradients."""
    if mode == BOTH:
        return results
    return (results, None) if mode == FORWARD else (None, results)


def _whole(mode, y, gradients):
    return {FORWARD: y, BACKWARD: gradients, BOTH: (y, gradients)}[mode]
