"""Gated experts, forward and with the gradients of all five inputs.

`ragged`, `capacity`, `dense`, `scan` and `reference` are the library's, the first the
default. `capacity` has as many places as the fullest expert needs, so that all compute
the same. `lax_ragged_dot` is the same as `ragged` by JAX's own grouped product.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.kernels import experts
from capibara_eqx.kernels._experts.specs import BENCHMARK_SPECS, Spec

from . import _expert_oracle
from ._harness import Contender, Prepared, Settings, compiled, entries, race
from ._inputs import normal
from ._records import Measurement


OPERATION = "experts"

_QUICK = (Spec("tiny", 24, 8, 4, 6, 2),)
# Of the copies that `reference` makes of the weights.
_MOST_BYTES = 2**27


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation, shape and mode."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        indices, arrays, dy = _inputs(spec)
        for mode in ("forward", "forward_backward"):
            cotangent = None if mode == "forward" else dy
            contenders = [
                Contender(
                    name,
                    partial(_prepare, function, indices, arrays, cotangent),
                    left_out=_too_large(spec) if name == "reference" else None,
                )
                for name, function in _functions(spec, indices).items()
            ]
            reference = partial(_expected, indices, arrays, cotangent)
            runners = entries(spec._asdict(), contenders, reference)
            yield from race(settings, OPERATION, mode, runners)


def _inputs(spec: Spec) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Choices, the other inputs of the experts, and a cotangent of the output."""
    _, tokens, d_model, count, d_ff, top_k = spec
    x, dy, scores, gate, up, down = normal(
        11,
        *[(tokens, d_model)] * 2,
        (tokens, count),
        *[(count, d_ff, d_model)] * 2,
        (count, d_model, d_ff),
    )
    indices = np.argsort(-scores, axis=-1)[:, :top_k].astype(np.int32)
    powers = np.exp(np.take_along_axis(scores, indices, axis=-1))
    weights = powers / np.sum(powers, axis=-1, keepdims=True)
    inner, outer = np.float32(d_model**-0.5), np.float32(d_ff**-0.5)
    return indices, (x, weights, gate * inner, up * inner, down * outer), dy


def _functions(spec: Spec, indices: np.ndarray) -> dict[str, Callable[..., Any]]:
    fullest = int(np.max(np.bincount(indices.ravel())))
    factor = fullest * spec.num_experts / (spec.top_k * spec.tokens)
    names = ("ragged", "capacity", "dense", "scan", "reference")
    return {
        **{name: partial(_library, name, factor) for name in names},
        "lax_ragged_dot": _lax_ragged_dot,
    }


def _library(name, factor, indices, x, weights, gate, up, down):
    factor = factor if name == "capacity" else None
    arrays = (x, indices, weights, gate, up, down)
    return experts(*arrays, capacity_factor=factor, implementation=name)[0]


def _lax_ragged_dot(indices, x, weights, gate, up, down):
    tokens, top_k = indices.shape
    expert = indices.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=len(gate))

    def product(rows, stacked):
        return jax.lax.ragged_dot(rows, jnp.swapaxes(stacked, 1, 2), sizes)

    rows = x[order // top_k]
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    y = product(hidden * weights.reshape(-1)[order][:, None], down)
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    return jnp.sum(y.reshape(tokens, top_k, -1), axis=1)


def _prepare(
    function: Callable[..., Any],
    indices: np.ndarray,
    arrays: tuple[np.ndarray, ...],
    dy: np.ndarray | None,
) -> Prepared:
    # Choices are not differentiated, and are not known when it is compiled.
    if dy is None:
        return compiled(function, jnp.asarray(indices), *map(jnp.asarray, arrays))

    def forward_backward(indices, dy, *arrays):
        y, pullback = jax.vjp(partial(function, indices), *arrays)
        return y, pullback(dy)

    return compiled(forward_backward, *map(jnp.asarray, (indices, dy, *arrays)))


def _expected(indices, arrays, dy):
    if dy is None:
        return _expert_oracle.experts(indices, *arrays)
    return _expert_oracle.experts_gradients(indices, *arrays, dy=dy)


def _too_large(spec: Spec) -> str | None:
    copies = 3 * 4 * spec.tokens * spec.top_k * spec.d_ff * spec.d_model
    if copies <= _MOST_BYTES:
        return None
    return f"copies {copies / 2**20:.0f} MiB of weights for its tokens"
