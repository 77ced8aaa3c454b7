"""A Hessian-vector product through the selective scan, in all six inputs.

Of sum(dy y), by forward mode over reverse and by reverse over reverse. PyTorch, on
which `mambapy_pscan` and `transformers_scan` run, takes part in the latter.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from capibara_eqx.kernels._selective_scan.specs import BENCHMARK_SPECS, Spec

from . import _oracle, _peers, _plain_scans
from ._harness import Contender, Settings, compiled, entries, race
from ._inputs import ScanInputs, normal, scan_inputs
from ._records import Measurement
from .selective_scan import LIBRARY, QUADRATIC, library_scan


OPERATION = "selective_scan_hvp"

_QUICK = Spec("tiny", 2, 32, 8, 4)
_SCANS = {
    **{name: library_scan(name) for name in LIBRARY},
    "plain_scan": _plain_scans.plain_scan,
    "associative_scan": _plain_scans.associative_scan,
}


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation and mode, at the small shape."""
    spec = _QUICK if settings.quick else BENCHMARK_SPECS[0]
    inputs = scan_inputs(*spec[1:])
    direction = normal(3, *(x.shape for x in inputs.arguments))
    # Step sizes stay positive along the direction.
    direction = tuple(
        v * 0.01 if index == 1 else v for index, v in enumerate(direction)
    )
    modes = {"forward_over_reverse": _forward, "reverse_over_reverse": _reverse}
    for mode, product in modes.items():
        contenders = [
            Contender(name, partial(_prepare, product, scan, inputs, direction))
            for name, scan in _SCANS.items()
        ]
        if product is _reverse:
            contenders += _theirs(inputs, direction, settings.quick)
        problem = (inputs.arguments, inputs.dy, direction)
        reference = partial(_oracle.selective_scan_hvp, *problem)
        runners = entries(spec._asdict(), contenders, reference)
        yield from race(settings, OPERATION, mode, runners)


def _theirs(inputs: ScanInputs, direction, quick: bool) -> list[Contender]:
    problem = (inputs.arguments, inputs.dy, direction)
    return [
        Contender("mambapy_pscan", partial(_peers.mambapy_hvp, *problem)),
        Contender(
            "transformers_scan",
            partial(_peers.transformers_hvp, *problem),
            left_out=None if quick else QUADRATIC,
        ),
    ]


def _forward(gradient, arguments, direction):
    return jax.jvp(gradient, arguments, direction)[1]


def _reverse(gradient, arguments, direction):
    # The Hessian is symmetric, so its transpose serves as well.
    return jax.vjp(gradient, *arguments)[1](direction)


def _prepare(product, scan, inputs: ScanInputs, direction):
    dy = jnp.asarray(inputs.dy)

    def gradient(*arguments):
        return jax.vjp(scan, *arguments)[1](dy)

    return compiled(
        lambda arguments, direction: product(gradient, arguments, direction),
        tuple(jnp.asarray(x) for x in inputs.arguments),
        tuple(jnp.asarray(v) for v in direction),
    )
