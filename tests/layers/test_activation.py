"""The activations against closed forms in float64, far out too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from support.tolerances import assert_close, tolerance

from capibara_eqx.layers._activation import activate


# Beyond 88 the exponential of float32 overflows.
POINTS = np.array([-1e4, -200, -90, -20, -3.7, -0.1, 0, 0.3, 2.5, 17, 100, 1e4])


def silu_derivatives(x):
    s = expit(x)
    slope = s * (1 + x * (1 - s))
    bend = s * (1 - s) * (2 + x * (1 - 2 * s))
    return x * s, slope, bend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_silu_and_its_derivatives(dtype):
    x = jnp.asarray(POINTS, dtype)

    def silu(x):
        return activate("silu", x)

    slope = jax.grad(silu)
    bend = jax.grad(slope)
    curve = jax.jvp(slope, (x[3],), (jnp.ones_like(x[3]),))[1]
    want = silu_derivatives(np.asarray(x, "float64"))
    for order, f in enumerate((silu, slope, bend)):
        got = np.asarray(jax.jit(jax.vmap(f))(x), "float64")
        # Each value by its own size. The slopes hold x (1 - s), where 1 - s is only
        # known to eps, for x up to log(1 / eps) = 16.
        smallest = 1e-30 if order == 0 else 16
        for i, (one, expected) in enumerate(zip(got, want[order], strict=True)):
            scale = max(abs(expected), smallest)
            assert abs(one - expected) <= tolerance(dtype) * scale, (order, POINTS[i])
    assert_close(curve, want[2][3], dtype=dtype)


def test_relu2_and_its_derivatives():
    x = jnp.asarray(POINTS, "float32")

    def relu2(x):
        return activate("relu2", x)

    wide = np.maximum(np.asarray(x, "float64"), 0)
    want = (wide**2, 2 * wide, np.where(wide > 0, 2.0, 0))
    # At zero the slope bends: either of its two values, and finite.
    for f, expected in zip(
        (relu2, jax.grad(relu2), jax.grad(jax.grad(relu2))), want, strict=True
    ):
        got = np.asarray(jax.jit(jax.vmap(f))(x), "float64")
        np.testing.assert_allclose(got, expected, rtol=tolerance("float32"))
