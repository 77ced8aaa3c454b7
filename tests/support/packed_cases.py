"""Packed products that tests run: their arguments, and how they are called."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support import packed_oracle as oracle
from support.derivatives import quick_jit

from capibara_eqx.kernels import quant_matmul
from capibara_eqx.kernels._quant_matmul.specs import Spec


def arguments(
    spec: Spec, batch: tuple[int, ...] | None = None, seed: int = 0, rows: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Float64 `x` and `scale`, a scale for every row if not given, and the rest.

    A batch, if given, stands for the tokens of the spec.
    """
    rng = np.random.default_rng(seed)
    least = 1 if spec.bits == 2 else 0
    shape = (spec.out_features, spec.in_features)
    codes = rng.integers(least, 2**spec.bits, shape)
    size = spec.group_size or spec.in_features
    groups = (rows or spec.out_features, -(-spec.in_features // size))
    batch = (spec.tokens,) if batch is None else batch
    smooth = {
        "x": rng.standard_normal((*batch, spec.in_features)),
        "scale": rng.uniform(0.2, 1.0, groups) / 2**spec.bits,
    }
    fixed: dict[str, Any] = {
        "codes": np.stack([oracle.pack(row, spec.bits) for row in codes])
    }
    if spec.zero:
        fixed["zero"] = rng.integers(0, 2**spec.bits, groups).astype(np.uint8)
    if spec.activations == "static_int8":
        # So that some of the tokens are clipped.
        fixed["input_scale"] = np.float32(1.2 / oracle.LARGEST)
    return smooth, fixed


def static(spec: Spec) -> dict[str, Any]:
    return {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "activations": spec.activations,
    }


def run(spec: Spec, implementation: Any, smooth: Any, fixed: Any) -> jax.Array:
    known = {name: jnp.asarray(values) for name, values in fixed.items()}
    options = static(spec) | {"implementation": implementation}
    return quant_matmul(smooth["x"], scale=smooth["scale"], **known, **options)


@functools.cache
def compiled(spec: Spec, implementation: Any = None) -> Any:
    """`run` of a spec, compiled."""
    return quick_jit(functools.partial(run, spec, implementation))


def expected(spec: Spec, smooth: Any, fixed: Any) -> np.ndarray:
    """By the loop, of the very numbers that the library got."""
    scale = np.asarray(smooth["scale"], np.float64)
    return oracle.quant_matmul(smooth["x"], scale=scale, **fixed, **static(spec))


def narrow(smooth: Any, dtype: str = "float32") -> dict[str, jax.Array]:
    return {name: jnp.asarray(values, dtype) for name, values in smooth.items()}


def rounded_already(spec, rows=0):
    """Arguments whose tokens are rounded to 127 steps: no two ways to round them."""
    smooth, fixed = arguments(spec, rows=rows)
    x = np.rint(np.clip(smooth["x"] * 40, -127, 127))
    x[:, 0] = 127
    return narrow(smooth) | {"x": jnp.asarray(x / 64, "float32")}, fixed


def terms(spec: Spec, smooth: Any) -> float:
    """How large the products that one output adds up may be."""
    scale = np.max(np.abs(np.asarray(smooth["scale"], np.float64)))
    x = np.max(np.abs(np.asarray(smooth["x"], np.float64)))
    return float(scale * x * 2**spec.bits)
