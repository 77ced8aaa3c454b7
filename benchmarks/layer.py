"""A Mamba layer over one row, forward and with the gradients of input and parameters.

`cpu` and `xla` are the library's, by the implementation of both kernels.
`transformers_mixer` is transformers' Mamba on PyTorch, `transformers_mambapy` the same
with mambapy's scan, as its settings offer. All have the same parameters.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.layers import Mamba

from . import _oracle, _peers
from ._harness import Contender, Prepared, Settings, compiled, entries, race
from ._inputs import normal
from ._records import Measurement
from .decode import layer_weights
from .selective_scan import QUADRATIC


OPERATION = "mamba_layer"


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation and mode."""
    d_model, seq = (16, 24) if settings.quick else (768, 1024)
    spec = {"name": f"{seq}_tokens", "batch": 1, "seq": seq, "d_model": d_model}
    x, dy = normal(6, (1, seq, d_model), (1, seq, d_model))
    weights = layer_weights(_layer(d_model, "cpu"))
    for mode in ("forward", "forward_backward"):
        cotangent = None if mode == "forward" else dy
        contenders = [
            Contender(name, partial(_prepare, name, x, cotangent))
            for name in ("cpu", "xla")
        ]
        contenders += _theirs(weights, x, cotangent, settings.quick)
        reference = partial(_expected, weights, x, cotangent)
        yield from race(settings, OPERATION, mode, entries(spec, contenders, reference))


def _theirs(weights, x, dy, quick: bool) -> list[Contender]:
    mixer = partial(_peers.transformers_mixer, weights, x, dy)
    left_out = None if dy is None or quick else QUADRATIC
    return [
        Contender("transformers_mixer", mixer, left_out=left_out),
        Contender("transformers_mambapy", partial(mixer, use_mambapy=True)),
    ]


def _layer(d_model: int, implementation: str) -> Mamba:
    return Mamba(d_model, implementation=implementation, key=jax.random.key(0))


def _prepare(implementation: str, x: np.ndarray, dy: np.ndarray | None) -> Prepared:
    layer = _layer(x.shape[-1], implementation)
    arrays, static = eqx.partition(layer, eqx.is_array)

    def forward(arrays, x):
        return eqx.combine(arrays, static)(x)

    prepared = compiled(forward, arrays, jnp.asarray(x), cotangent=dy)
    return prepared if dy is None else replace(prepared, outputs=_named)


def _named(result: Any) -> Any:
    """The gradients in the parameters under the names of the float64 reference."""
    y, (gradients, dx) = result
    return y, (layer_weights(gradients), dx)


def _expected(weights: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray | None):
    if dy is None:
        return _oracle.mamba(weights, x)
    return _oracle.mamba_gradients(weights, x, dy)
