"""One S4D layer over a long row: as a convolution, in chunks, and token by token.

`convolution` is the layer's default, by Fourier transforms; `chunked` hands the state
from chunk to chunk of 64 tokens; `recurrent` is the direct recurrence, one token after
the other. Forward, and with the gradient of the input. 64 channels of 64 states.
"""

from collections.abc import Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.signal import fftconvolve
from scipy.special import erf

from capibara_eqx.layers import S4D

from ._harness import Contender, Settings, compiled, entries, race
from ._inputs import normal
from ._records import Measurement


OPERATION = "s4d"

MODES = ("convolution", "chunked", "recurrent")


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a way to read, length and mode."""
    d_model, lengths = (4, (200,)) if settings.quick else (64, (1024, 16384))
    layers = {mode: S4D(d_model, mode=mode, key=jax.random.key(0)) for mode in MODES}
    for seq in lengths:
        spec = {"name": f"{seq}_tokens", "batch": 1, "seq": seq, "d_model": d_model}
        x, dy = normal(8, *[(1, seq, d_model)] * 2)
        for mode in ("forward", "forward_backward"):
            cotangent = None if mode == "forward" else dy
            contenders = [
                Contender(name, partial(_prepare, layer, x, cotangent))
                for name, layer in layers.items()
            ]
            reference = partial(expected, layers["convolution"], x[0], cotangent)
            runners = entries(spec, contenders, reference)
            yield from race(settings, OPERATION, mode, runners)


def _prepare(layer: S4D, x: np.ndarray, dy: np.ndarray | None):
    arrays, static = eqx.partition(layer, eqx.is_array)

    # The parameters are arguments: the kernel is made in every call, as in training.
    def read(x, arrays):
        return eqx.combine(arrays, static)(x)

    if dy is None:
        return compiled(read, jnp.asarray(x), arrays)

    def with_gradient(dy, x, arrays):
        y, pullback = jax.vjp(lambda x: read(x, arrays), x)
        return y, pullback(dy)

    return compiled(with_gradient, jnp.asarray(dy), jnp.asarray(x), arrays)


def expected(layer: S4D, x: np.ndarray, dy: np.ndarray | None):
    """The layer in float64 from its formula, with a kernel of powers of each state."""
    x, dy = (None if v is None else np.asarray(v, np.float64) for v in (x, dy))
    kernel = _kernel(layer, len(x))
    D, W, c = (
        np.asarray(v, np.float64)
        for v in (layer.D, layer.output.proj.weight, layer.output.proj.bias)
    )
    s = fftconvolve(x, kernel, axes=0)[: len(x)] + D * x
    cumulative = 0.5 * (1 + erf(s / np.sqrt(2)))
    a, b = np.split(s * cumulative @ W.T + c, 2, axis=-1)
    gate = 1 / (1 + np.exp(-b))
    if dy is None:
        return (a * gate)[None]
    dz = np.concatenate([dy[0] * gate, dy[0] * a * gate * (1 - gate)], axis=-1)
    slope = cumulative + s * np.exp(-s * s / 2) / np.sqrt(2 * np.pi)
    ds = dz @ W * slope
    back = fftconvolve(ds[::-1], kernel, axes=0)[: len(x)][::-1]
    return (a * gate)[None], (back + D * ds)[None]


def _kernel(layer: S4D, seq: int) -> np.ndarray:
    """2 Re sum_n C_n A_bar_n^t B_bar_n by a zero-order hold, one token a time."""
    decay, A_imag, C, log_dt = (
        np.asarray(v, np.float64)
        for v in (layer.log_A_real, layer.A_imag, layer.C, layer.log_dt)
    )
    A = -np.exp(decay) + 1j * A_imag
    step = A * np.exp(log_dt)[:, None]
    h = np.expm1(step) / A * (C[..., 0] + 1j * C[..., 1])
    kernel = np.empty((seq, len(A)))
    for t in range(seq):
        kernel[t] = 2 * h.sum(-1).real
        h = h * np.exp(step)
    return kernel
