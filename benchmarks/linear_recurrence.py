"""The elementwise linear recurrence, forward and with both gradients.

`xla` and `reference` are the library's, `associative_scan` is JAX's.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.kernels import linear_recurrence
from capibara_eqx.kernels._linear_recurrence.specs import BENCHMARK_SPECS, Spec

from . import _oracle
from ._harness import Contender, Settings, compiled, entries, race
from ._inputs import normal
from ._records import Measurement


OPERATION = "linear_recurrence"

_QUICK = (Spec("tiny", 2, 40, 8),)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        x, dh, decay = normal(1, *[spec[1:]] * 3)
        a = np.asarray(np.exp(-0.1 * np.abs(decay)), np.float32)
        for mode in ("forward", "forward_backward"):
            cotangent = None if mode == "forward" else dh
            runners = entries(
                spec._asdict(),
                [
                    Contender(name, partial(_prepare, function, a, x, cotangent))
                    for name, function in _FUNCTIONS.items()
                ],
                partial(_expected, a, x, cotangent),
            )
            yield from race(settings, OPERATION, mode, runners)


def _library(implementation: str):
    return lambda a, x: linear_recurrence(a, x, implementation=implementation)[0]


def _associative(a, x):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, x), axis=1)[1]


_FUNCTIONS = {
    "xla": _library("xla"),
    "reference": _library("reference"),
    "associative_scan": _associative,
}


def _prepare(function, a, x, cotangent):
    return compiled(function, jnp.asarray(a), jnp.asarray(x), cotangent=cotangent)


def _expected(a, x, cotangent):
    if cotangent is None:
        return _oracle.linear_recurrence(a, x)
    return _oracle.linear_recurrence_gradients(a, x, cotangent)
