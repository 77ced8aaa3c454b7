"""The one table of tolerances, and the comparison that uses it.

A sum of n terms computed in a format with spacing `eps` is off by about
`eps * sqrt(n)` of the size of the terms, so a tolerance here is
`factor * eps * sqrt(length)`, taken relative to the largest expected value. The factor
covers the few roundings in each term (`exp`, `softplus`, products).
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


EPSILONS = {
    "float64": 2.0**-52,
    "complex128": 2.0**-52,
    "float32": 2.0**-23,
    "complex64": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}

# Derivatives of the NumPy loops come from finite differences in float64, whose error
# grows with the order. `finite_differences` reports its own error bound, and a test
# that uses a number from this table checks the bound against it first.
DIFFERENCE_TOLERANCES = {1: 1e-9, 2: 1e-7, 3: 2e-6}


def tolerance(dtype: np.typing.DTypeLike, length: int = 1, factor: float = 8.0):
    """The relative tolerance for a sum of `length` terms computed in `dtype`."""
    return factor * EPSILONS[jnp.dtype(dtype).name] * max(1, length) ** 0.5


def as_wide(values: ArrayLike) -> np.ndarray:
    """`values` as a NumPy float64 or complex128 array."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.complexfloating):
        return array.astype(np.complex128)
    return array.astype(np.float64)


def assert_close(
    actual: ArrayLike,
    expected: ArrayLike,
    *,
    dtype: np.typing.DTypeLike,
    length: int = 1,
    factor: float = 8.0,
    terms: float = 1e-30,
    name: str = "result",
) -> None:
    """Fail if `actual` is further from `expected` than arithmetic in `dtype` explains.

    The error allowed is `tolerance * max |expected|`, the error of a sum whose terms
    are as large as the largest result; where all results may be small because their
    terms cancel, `terms` is the size of the terms.
    """
    got, want = as_wide(actual), as_wide(expected)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    assert np.all(np.isfinite(want)), f"{name}: the expected value is not finite"
    assert np.all(np.isfinite(got)), f"{name}: not finite"
    allowed = tolerance(dtype, length, factor) * max(np.max(np.abs(want)), terms)
    worst = np.max(np.abs(got - want))
    assert worst <= allowed, (
        f"{name}: off by {worst:.3e}, allowed {allowed:.3e} "
        f"(largest expected value {np.max(np.abs(want)):.3e})"
    )


def assert_rounded(
    actual: ArrayLike,
    expected: ArrayLike,
    *,
    length: int = 1,
    name: str = "result",
) -> None:
    """Fail unless `actual` is `expected` computed in float32 and then rounded.

    Each value may be off by one spacing of `actual`'s own dtype, relative to itself,
    and by the float32 tolerance relative to the largest value: a sum accumulated in a
    narrow dtype does not pass.
    """
    narrow = jnp.dtype(jnp.asarray(actual).dtype).name
    got, want = as_wide(actual), as_wide(expected)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    allowed = EPSILONS[narrow] * np.abs(want)
    allowed = allowed + tolerance(np.float32, length) * np.max(np.abs(want))
    worst = np.max(np.abs(got - want) / allowed)
    assert worst <= 1.0, f"{name}: off by {worst:.3g} times what {narrow} allows"
