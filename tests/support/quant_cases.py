"""Weights and specs for tests of compression: few shapes, so that little compiles."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from capibara_eqx.arrays import Affine, Ternary, compress


KINDS: dict[str, dict[str, Any]] = {
    "narrow": {"range": "narrow"},
    "full": {"range": "full"},
    "asymmetric": {"symmetric": False},
}
OUT, IN = 3, 7
seeds = st.integers(0, 2**32 - 1)


@functools.cache
def compiled() -> Any:
    """One compilation a spec and a shape, for all tests of a process."""
    return eqx.filter_jit(compress)


SPECS: dict[str, Any] = {
    "int8": Affine(8),
    "int8 a8": Affine(8, activations="int8"),
    "int4 g3": Affine(4, group_size=3),
    "int4 g3 a8": Affine(4, group_size=3, activations="int8"),
    "int3 asymmetric": Affine(3, symmetric=False),
    "int8 asymmetric g2 a8": Affine(
        8, symmetric=False, group_size=2, activations="int8"
    ),
    "int2 full tensor": Affine(2, range="full", granularity="tensor"),
    "int5 percentile": Affine(5, calibration="percentile", percentile=90.0),
    "int4 mse": Affine(4, calibration="mse", group_size=3),
    "int6 bf16 steps": Affine(6, scale_dtype=jnp.bfloat16),
    "int7 identity": Affine(7, range="full", gradient="identity"),
    "int4 learned": Affine(4, learned_step=True, group_size=3),
    "int8 learned a8": Affine(8, learned_step=True, activations="int8"),
    "ternary": Ternary(),
    "ternary a8": Ternary(activations="int8"),
    "ternary base3": Ternary(packing="base3"),
    "ternary seed": Ternary(scale="seed"),
    "ternary l2 bf16": Ternary(scale="l2", scale_dtype=jnp.bfloat16),
    "ternary learned": Ternary(scale="learned"),
}

# The others run with the slow tests; `test_training_computes_...` draws from all.
QUICK = ("int4 g3", "int8 asymmetric g2 a8", "int5 percentile", "ternary a8")
QUICK += ("int4 learned", "ternary learned")
names = pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SPECS],
)


def weight_of(seed: int, shape=(OUT, IN), power: int | None = None) -> np.ndarray:
    """float32: random numbers, whole ones (many ties), a row of zeros, an outlier."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    form = seed % 5
    if form == 1:
        weight = rng.integers(-8, 9, shape).astype(np.float64)
    if form == 2:
        weight[..., 0, :] = 0
        weight[..., 1, :] = -3.5
    if form == 3:
        weight[..., 0, 2] = 100
    if power is None:
        power = int(rng.integers(-20, 20))
    return (weight * 2.0**power).astype(np.float32)


def bytes_of(spec: Any, shape: tuple[int, ...]) -> int:
    """`bits` a code, a step a group, `bits` a zero point; each row in whole bytes."""
    rows = math.prod(shape[:-1])
    size = jnp.dtype(spec.scale_dtype or "float32").itemsize
    if isinstance(spec, Ternary):
        per_byte = 5 if spec.packing == "base3" else 4
        return rows * -(-shape[-1] // per_byte) + size * math.prod(shape[:-2])
    groups = -(-shape[-1] // spec.group_size) if spec.group_size else 1
    sharers = math.prod(shape[:-2]) if spec.granularity == "tensor" else rows
    parts = [width for width in (8, 4, 2, 1) if spec.bits & width]
    total = rows * sum(-(-shape[-1] * width // 8) for width in parts)
    total += sharers * groups * size
    if not spec.symmetric:
        total += sharers * sum(-(-groups * width // 8) for width in parts)
    return total


def random(shape, seed: int = 0, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)
