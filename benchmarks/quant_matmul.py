"""Products with matrices that are kept as packed codes.

`float32` is the product with the same matrix in 32 bits, by XLA. `cpu` (in C++, for
tokens of eight bits, and then the default on a CPU), `xla` and `reference`, which
writes the matrix out, are the library's. A name says how many bits a weight has (1.58:
one of three values), how many share a scale (`g`), and with how many bits tokens are
multiplied (`A8`), with all of theirs if it does not say. The values of the tokens are
of eight bits already, so that errors are those of the product.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from capibara_eqx.kernels import pack_codes, quant_matmul

# The named shapes are shared with the tests; they are no part of the public interface.
from capibara_eqx.kernels._quant_matmul.specs import BENCHMARK_SPECS, Spec

from . import _packed_oracle
from ._harness import Contender, Settings, compiled, entries, race
from ._records import Measurement


OPERATION = "quant_matmul"

_QUICK = (
    Spec("tiny", 5, 24, 6, 2, activations="int8"),
    Spec("tiny_groups", 5, 24, 6, 4, 8),
)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation and shape."""
    for spec in _QUICK if settings.quick else BENCHMARK_SPECS:
        x, codes, scale = _inputs(spec)
        middle = 2 ** (spec.bits - 1)
        whole = _packed_oracle.matrix(codes, scale, spec.group_size, middle)
        packed = pack_codes(jnp.asarray(codes), spec.bits)
        ours = [
            Contender(name, partial(_prepare, _library(spec, name), x, packed, scale))
            for name in ("cpu", "xla", "reference")
            # It is for whole numbers, and says so.
            if name != "cpu" or spec.activations is not None
        ]
        dense = Contender("float32", partial(_prepare, _dense, x, np.float32(whole)))
        sizes = spec._asdict()
        runners = [
            *entries(sizes, [dense], partial(_expected, x, whole, None)),
            *entries(sizes, ours, partial(_expected, x, whole, spec.activations)),
        ]
        yield from race(settings, OPERATION, "forward", runners)


def _inputs(spec: Spec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of 127 steps to either side, codes, and a scale for every group."""
    rng = np.random.default_rng(13)
    x = np.clip(
        np.rint(rng.normal(size=(spec.tokens, spec.in_features)) * 32), -127, 127
    )
    x[:, 0] = 127
    # Two bits are one of three values here.
    least = 1 if spec.bits == 2 else 0
    shape = (spec.out_features, spec.in_features)
    codes = rng.integers(least, 2**spec.bits, shape).astype(np.uint8)
    groups = -(-spec.in_features // (spec.group_size or spec.in_features))
    scale = rng.uniform(0.5, 1.0, (spec.out_features, groups)) / 2**spec.bits
    return np.float32(x / 32), codes, np.float32(scale)


def _library(spec: Spec, name: str) -> Callable[..., Any]:
    return partial(
        quant_matmul,
        bits=spec.bits,
        group_size=spec.group_size,
        activations=spec.activations,
        implementation=name,
    )


def _dense(x, whole):
    return x @ whole.T


def _prepare(function, *arrays):
    return compiled(function, *map(jnp.asarray, arrays))


def _expected(x: np.ndarray, whole: np.ndarray, activations: str | None) -> np.ndarray:
    exact = _packed_oracle.round_tokens(x) if activations else x.astype(np.float64)
    return exact @ whole.T
