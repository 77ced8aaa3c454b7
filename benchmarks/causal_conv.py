"""The depthwise causal convolution, forward and with the gradients of all inputs.

`cpu`, `xla` and `reference` are the library's, `general_convolution` is
`jax.lax.conv_general_dilated` with one group a channel.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from capibara_eqx.kernels import causal_conv
from capibara_eqx.kernels._causal_conv.specs import BENCHMARK_SPECS, Spec

from . import _oracle
from ._harness import Contender, Settings, compiled, entries, race
from ._inputs import normal
from ._records import Measurement


OPERATION = "causal_conv"

_QUICK = (Spec("tiny", 2, 24, 6, 6, 4, groups=6),)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        channels = spec.c_in
        if (spec.groups, spec.c_out, spec.dilation) != (channels, channels, 1):
            raise ValueError(f"only depthwise convolutions are compared, not {spec}.")
        shape = (spec.batch, spec.seq, channels)
        x, dy, weight, bias = normal(
            2, shape, shape, (channels, 1, spec.width), (channels,)
        )
        for mode in ("forward", "forward_backward"):
            cotangent = None if mode == "forward" else dy
            runners = entries(
                spec._asdict(),
                [
                    Contender(name, partial(_prepare, f, (x, weight, bias), cotangent))
                    for name, f in _FUNCTIONS.items()
                ],
                partial(_expected, (x, weight, bias), cotangent),
            )
            yield from race(settings, OPERATION, mode, runners)


def _library(implementation: str):
    def convolve(x, weight, bias):
        groups = x.shape[-1]
        return causal_conv(
            x, weight, bias, groups=groups, implementation=implementation
        )[0]

    return convolve


def _general(x, weight, bias):
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        window_strides=(1,),
        padding=[(weight.shape[-1] - 1, 0)],
        dimension_numbers=("NWC", "OIW", "NWC"),
        feature_group_count=x.shape[-1],
    )
    return y + bias[None, None]


_FUNCTIONS = {
    "cpu": _library("cpu"),
    "xla": _library("xla"),
    "reference": _library("reference"),
    "general_convolution": _general,
}


def _prepare(function, inputs, cotangent):
    arrays = (jnp.asarray(x) for x in inputs)
    return compiled(function, *arrays, cotangent=cotangent)


def _expected(inputs, cotangent):
    if cotangent is None:
        return _oracle.causal_conv(*inputs)
    return _oracle.causal_conv_gradients(*inputs, dy=cotangent)
