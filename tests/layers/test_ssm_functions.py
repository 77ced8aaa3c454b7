"""`causal_conv` and `ssm_step` against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused
from support.numpy_oracles import silu
from support.tolerances import assert_close

from capibara_eqx.layers import causal_conv, ssm_step


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize(("batch", "seq", "width"), [((), 9, 4), ((2, 3), 2, 5)])
def test_a_convolution_is_that_of_numpy(batch, seq, width):
    x, kernel = random(*batch, seq, 3), random(3, width, seed=1)
    want = np.zeros(x.shape)
    for index in np.ndindex(*batch, 3):
        row = (*index[:-1], slice(None), index[-1])
        signal, taps = (v.astype("float64") for v in (x[row], kernel[index[-1], ::-1]))
        want[row] = silu(np.convolve(signal, taps)[:seq])
    got = jax.jit(causal_conv)(x, kernel)
    assert_close(got, want, dtype="float32", length=width)


def test_a_kernel_of_one_tap_is_silu():
    x = random(2, 5, 3)
    now = jnp.zeros((3, 4)).at[:, -1].set(1.0)
    assert_close(jax.jit(causal_conv)(x, now), silu(x), dtype="float32")


def test_no_output_sees_a_later_token():
    x, kernel = random(7, 2), random(2, 3, seed=1)
    run = jax.jit(causal_conv)
    y = run(x, kernel)
    for t in range(7):
        other = run(
            np.where(np.arange(7)[:, None] > t, 5.0, x).astype("float32"), kernel
        )
        np.testing.assert_array_equal(other[: t + 1], y[: t + 1])


def test_steps_are_those_of_numpy():
    A, B, C = 0.5 * random(4, 4), random(4, 2, seed=1), random(3, 4, seed=2)
    x, h, y_before = random(6, 5, 2), random(5, 4, seed=3), random(5, 3, seed=4)

    @jax.jit
    def run(carry, x, *matrices):
        return jax.lax.scan(lambda c, x_t: ssm_step(c, x_t, *matrices), carry, x)

    (last, y_last), y = run((h, y_before), x, A, B, C)
    want, outputs = h.astype("float64"), []
    for t in range(6):
        want = want @ A.T.astype("float64") + x[t] @ B.T
        outputs.append(want @ C.T)
    assert_close(y, np.stack(outputs), dtype="float32", length=24)
    assert_close(last, want, dtype="float32", length=24)
    np.testing.assert_array_equal(y_last, y[-1])
    # The previous output is carried, and plays no part.
    _, other = run((h, y_before + 1), x, A, B, C)
    np.testing.assert_array_equal(other, y)


def test_a_narrow_input_leaves_the_state_wide():
    A, B, C = random(4, 4), random(4, 2), random(3, 4)
    x = jnp.asarray(random(2), "bfloat16")
    carry = (jnp.zeros(4), jnp.zeros(3, "bfloat16"))
    (h, y_last), y = jax.jit(ssm_step)(carry, x, A, B, C)
    assert h.dtype == jnp.float32
    assert y.dtype == y_last.dtype == jnp.bfloat16
    assert_close(h, np.asarray(x, "float64") @ B.T, dtype="float32", length=2)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("A", (4, 3)),
        ("A", (4,)),
        ("B", (2, 4)),
        ("C", (4, 3)),
        ("x_t", (3, 2)),
        ("carry[1]", (5, 3)),
    ],
)
def test_shapes_that_do_not_fit(name, shape):
    shapes = {"A": (4, 4), "B": (4, 2), "C": (3, 4), "x_t": (2, 2), "carry[1]": (2, 3)}
    arrays = {key: jnp.zeros(value) for key, value in (shapes | {name: shape}).items()}
    carry = (jnp.zeros((2, 4)), arrays.pop("carry[1]"))
    with refused("ssm_step", f"`{name}`", str(shape)):
        ssm_step(carry, **arrays)


@pytest.mark.errors
def test_a_convolution_that_does_not_fit():
    for shape in ((4,), (3, 1, 4), (3, 0)):
        with refused("causal_conv", "`conv_kernel`", "(d, width >= 1)", str(shape)):
            causal_conv(jnp.zeros((5, 3)), jnp.zeros(shape))
    with refused("causal_conv", "`x`", "(5, 4)"):
        causal_conv(jnp.zeros((5, 4)), jnp.zeros((3, 2)))
    with refused("causal_conv", "`x`", "zero-length"):
        causal_conv(jnp.zeros((0, 3)), jnp.zeros((3, 2)))
