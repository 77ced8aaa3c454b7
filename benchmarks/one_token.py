"""The selective scan over one token, as decoding calls it, by implementation.

With all that a layer asks for: step sizes through softplus, skip weights, gate and an
initial state. `transformers_update` is the update of one token of transformers.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp

from capibara_eqx.kernels import selective_scan

from . import _oracle, _peers
from ._harness import Contender, Prepared, Settings, compiled, entries, race
from ._inputs import token_inputs
from ._records import Measurement
from .selective_scan import LIBRARY


OPERATION = "selective_scan_step"


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation and batch size."""
    d_inner, d_state = (8, 4) if settings.quick else (1536, 16)
    for batch in (2,) if settings.quick else (1, 8):
        spec = {"name": f"batch_{batch}", "batch": batch}
        spec |= {"d_inner": d_inner, "d_state": d_state}
        token = token_inputs(batch, d_inner, d_state)
        contenders = [
            Contender(name, partial(_prepare, name, token)) for name in LIBRARY
        ]
        update = partial(_peers.transformers_update, token)
        contenders.append(Contender("transformers_update", update))
        reference = partial(_oracle.selective_scan_step, **token)
        yield from race(
            settings, OPERATION, "step", entries(spec, contenders, reference)
        )


def _prepare(implementation: str, token: dict[str, Any]) -> Prepared:
    def step(token):
        sequence = {
            name: token[name][:, None] for name in ("u", "delta", "B", "C", "z")
        }
        y, state = selective_scan(
            **{**token, **sequence}, delta_softplus=True, implementation=implementation
        )
        return y[:, 0], state

    return compiled(step, {name: jnp.asarray(x) for name, x in token.items()})
