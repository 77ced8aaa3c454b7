"""BitNetQuantizer, AffineQuantizer and quantize_to_158bit against float64 loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import bitnet_oracle as oracle
from support.numpy_oracles import wide
from support.precision import enable_x64
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.arrays import Affine, AffineArray, Ternary, TernaryArray, compress
from capibara_eqx.kernels import round_tokens
from capibara_eqx.layers import (
    AffineQuantizer,
    BitNetQuantizer,
    Linear,
    quantize_to_158bit,
)


pytestmark = pytest.mark.slow


# Values whose float32 sums and products are near enough to those of float64.
SIZES = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
# Few shapes: each of them is compiled.
SHAPES = st.sampled_from([(7,), (3, 5), (2, 3, 6)])
WEIGHTS = SHAPES.flatmap(lambda shape: arrays("float32", shape, elements=SIZES))


def random(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@eqx.filter_jit
def run(layer, x):
    return layer(x)


@eqx.filter_jit
def there_and_back(quantizer, weights):
    node = quantizer.quantize(weights)
    return node, quantizer.dequantize(node)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_tokens(bits):
    with enable_x64():
        x = random((2, 3, 7), dtype="float64")
        got = run(BitNetQuantizer(bits), x)
        rows = wide(x).reshape(-1, 7)
        want = [oracle.rounded_token(row, bits) for row in rows]
        assert_close(got, np.reshape(want, x.shape), dtype="float64")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_between_their_ends(bits):
    with enable_x64():
        x = random((6, 7), dtype="float64") + 0.5
        want = []
        for row in wide(x):
            codes, step, zero = oracle.affine_row(row, bits, False, False)
            want.append(step * (codes - zero))
        got = run(BitNetQuantizer(bits, False), x)
        assert_close(got, np.array(want), dtype="float64")


def test_eight_bits_are_those_of_the_products():
    x = random((4, 9)).at[2].set(0.0)
    np.testing.assert_array_equal(run(BitNetQuantizer(), x), round_tokens(x))


@given(x=arrays("float32", (4, 5), elements=SIZES), t=st.integers(0, 2))
def test_tokens_are_rounded_by_themselves(x, t):
    """By half a step at most; a later token changes nothing before it."""
    got = np.asarray(run(BitNetQuantizer(4), x))
    step = np.max(np.abs(x), axis=-1, keepdims=True) / 7
    assert np.all(np.abs(got - x) <= step * (0.5 + 8 * EPSILONS["float32"]))
    changed = np.array(x)
    changed[t + 1 :] *= 3
    np.testing.assert_array_equal(
        run(BitNetQuantizer(4), changed)[: t + 1], got[: t + 1]
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_of_tokens_pass(symmetric):
    layer, x, g = BitNetQuantizer(3, symmetric), random((2, 5)), random((2, 5), 1)
    for function in (layer, eqx.nn.inference_mode(layer), jax.checkpoint(layer)):
        gradient = jax.jit(jax.grad(lambda x, f=function: jnp.sum(g * f(x))))(x)
        np.testing.assert_array_equal(gradient, g)
    # Of a square the second derivative is two, rounded or not.
    bend = jax.jit(jax.hessian(lambda x: jnp.sum(layer(x) ** 2)))(x[0])
    np.testing.assert_array_equal(bend, 2 * np.eye(5))


def nearest(weights, node, spec):
    """Every value is the nearest that its step allows, inside the range of codes."""
    rows = wide(weights).reshape(-1, weights.shape[-1])
    got = wide(node.dense()).reshape(rows.shape)
    for row, found in zip(rows, got, strict=True):
        narrow = spec.is_narrow
        _, step, _ = oracle.affine_row(row, spec.bits, spec.symmetric, narrow)
        # Of a largest value that lies between two codes either is nearest; a zero
        # point moves by as much.
        slack = step * (0.5 + 2**spec.bits * EPSILONS["float32"])
        assert np.all(np.abs(found - row) <= slack * (1 if spec.symmetric else 2))
        assert np.all(found[row == 0] == 0)


@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (8, True), (4, False)])
@given(weights=WEIGHTS)
@pytest.mark.slow
def test_arrays_of_any_axes(bits, symmetric, weights):
    quantizer = AffineQuantizer(bits, symmetric)
    node, back = there_and_back(quantizer, jnp.asarray(weights))
    assert isinstance(node, AffineArray)
    assert node.shape == back.shape == weights.shape
    assert back.dtype == weights.dtype
    nearest(weights, node, quantizer.spec)
    np.testing.assert_array_equal(node.dense(), back)


@pytest.mark.slow
def test_a_vector_is_a_row():
    vector = random((11,))
    for quantizer in (
        AffineQuantizer(4, group_size=3),
        AffineQuantizer(8, False, calibration="mse"),
        AffineQuantizer(6, channel_wise=False),
    ):
        node = quantizer.quantize(vector)
        row = compress(vector[None], quantizer.spec)
        assert node.nbytes == row.nbytes
        np.testing.assert_array_equal(quantizer.dequantize(node), row.dense()[0])
        # As of a layer in a stack, sliced by `vmap`.
        sliced = jax.vmap(lambda node: node.dense())(row)
        np.testing.assert_array_equal(sliced[0], quantizer.dequantize(node))


def test_steps_for_channels_or_one():
    weights = random((4, 6)) * jnp.asarray([[1.0], [10.0], [0.1], [3.0]])
    channels = AffineQuantizer(8).quantize(weights)
    whole = AffineQuantizer(8, channel_wise=False).quantize(weights)
    sizes = np.max(np.abs(wide(weights)), axis=-1, keepdims=True)
    assert_close(channels.scale, sizes / 127, dtype="float32")
    assert_close(whole.scale, np.max(sizes, keepdims=True) / 127, dtype="float32")
    assert AffineQuantizer(8, channel_wise=False).spec == Affine(granularity="tensor")


def test_what_is_quantized_is_a_weight():
    layer, x = Linear(6, 4, key=jax.random.key(0)), random((3, 6))
    node = AffineQuantizer(4, symmetric=False).quantize(layer.weight)
    got = eqx.tree_at(lambda m: m.weight, layer, node)(x)
    want = wide(x) @ wide(node.dense()).T + wide(layer.bias)
    assert_close(got, want, dtype="float32", length=7)


def seeds_function(weights):
    """As the seeds have it, in float64."""
    weights = wide(weights)
    threshold = 0.5 * np.mean(np.abs(weights))
    signs = np.where(weights > threshold, 1.0, np.where(weights < -threshold, -1, 0))
    return signs, np.mean(np.abs(weights)) / np.mean(np.abs(signs))


@eqx.filter_jit
def ternarized(weights):
    return quantize_to_158bit(weights)


@given(
    weights=st.sampled_from([(7,), (3, 5)]).flatmap(
        lambda shape: arrays("float32", shape, elements=SIZES).filter(np.any)
    )
)
def test_the_function_of_the_seeds(weights):
    node = ternarized(jnp.asarray(weights))
    assert isinstance(node, TernaryArray)
    assert node.spec == Ternary(scale="seed")
    signs, scale = seeds_function(weights)
    # A value at the threshold may fall on either side of it.
    size = np.abs(wide(weights)) / np.mean(np.abs(wide(weights)))
    border = np.abs(size - 0.5) <= 16 * EPSILONS["float32"]
    got = np.asarray(node.ternary)
    np.testing.assert_array_equal(got[~border], signs[~border])
    scale *= np.mean(np.abs(signs)) / np.mean(np.abs(got))
    assert_close(np.ravel(node.scale)[0], scale, dtype="float32", length=weights.size)
    assert_close(node.dense(), scale * got, dtype="float32", length=weights.size)


def test_the_function_of_the_seeds_takes_zeros():
    """Theirs divides by the mean of no codes."""
    for shape in ((5,), (3, 4)):
        node = quantize_to_158bit(jnp.zeros(shape))
        np.testing.assert_array_equal(node.dense(), np.zeros(shape))
        np.testing.assert_array_equal(node.ternary, np.zeros(shape, "int8"))


def test_the_scale_of_the_seeds_stays():
    """What was rounded is rounded to itself."""
    once = quantize_to_158bit(random((9, 8)))
    twice = quantize_to_158bit(once.dense())
    np.testing.assert_array_equal(twice.ternary, once.ternary)
    assert_close(twice.scale, once.scale, dtype="float32", length=72)
