"""Causal attention, forward and with the gradients of queries, keys and values.

`blockwise` and `xla` are the library's: a block of scores at a time, and all of them at
once. `jax_nn` is `jax.nn.dot_product_attention` itself with its own causal mask,
`torch_sdpa` PyTorch's `scaled_dot_product_attention`, which works in blocks too. What
would need more than 12 GiB of temporaries takes no part. Errors are those of all
outputs, gradients included, at every length.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx import kernels

# The named shapes are shared with the tests; they are no part of the public interface.
from capibara_eqx.kernels._attention.specs import BENCHMARK_SPECS, Spec

from . import _attention_oracle, _peers
from ._harness import (
    Contender,
    Prepared,
    Settings,
    TooLarge,
    compiled,
    entries,
    race,
)
from ._inputs import normal
from ._records import Measurement


OPERATION = "attention"

# More than one block of queries and of keys.
_QUICK = (Spec("tiny", 1, 300, 300, 2, 2, 8, 8),)
_MOST_TEMPORARIES = 12 * 2**30


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        inputs, dy = _inputs(spec)
        # The outputs of the forward pass are those of both modes.
        gradients = cache(partial(_attention_oracle.gradients, *inputs, dy))
        for mode in ("forward", "forward_backward"):
            cotangent = None if mode == "forward" else dy
            forward = lambda known=gradients: known()[0]
            contenders = [
                *_ours(inputs, cotangent),
                Contender(
                    "torch_sdpa", partial(_peers.torch_attention, inputs, cotangent)
                ),
            ]
            runners = entries(
                spec._asdict(),
                contenders,
                forward if cotangent is None else gradients,
            )
            yield from race(settings, OPERATION, mode, runners)


def _inputs(spec: Spec) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Queries, keys and values, and a cotangent of the result."""
    *inputs, dy = normal(
        8,
        (spec.batch, spec.query, spec.n_heads, spec.head_dim),
        (spec.batch, spec.key, spec.n_kv_heads, spec.head_dim),
        (spec.batch, spec.key, spec.n_kv_heads, spec.v_dim),
        (spec.batch, spec.query, spec.n_heads, spec.v_dim),
    )
    return tuple(inputs), dy


def _ours(inputs, dy: np.ndarray | None) -> list[Contender]:
    """The library's implementations, and what jax itself has."""
    functions: dict[str, Callable[..., Any]] = {
        "blockwise": partial(kernels.attention, implementation="blockwise"),
        "xla": partial(kernels.attention, implementation="xla"),
        "jax_nn": partial(jax.nn.dot_product_attention, implementation="xla"),
    }
    return [
        Contender(name, partial(_prepare, function, inputs, dy))
        for name, function in functions.items()
    ]


def _prepare(function: Callable[..., Any], inputs, dy: np.ndarray | None) -> Prepared:
    prepared = compiled(
        partial(function, is_causal=True),
        *(jnp.asarray(x) for x in inputs),
        cotangent=dy,
    )
    needed = prepared.temp_bytes
    if needed is not None and needed > _MOST_TEMPORARIES:
        raise TooLarge(
            f"it needs {needed / 2**30:.1f} GiB of temporaries, more than "
            f"{_MOST_TEMPORARIES / 2**30:.0f} GiB"
        )
    return prepared
