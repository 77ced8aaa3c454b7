"""BitNet158 against float64 loops, and its packed form against itself in training."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import bitnet_oracle as oracle
from support.derivatives import check_first_order, check_second_order
from support.numpy_oracles import rms_norm, wide
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.arrays import AffineArray, FakeQuantArray, Ternary, TernaryArray
from capibara_eqx.layers import AffineQuantizer, BitNet158, weight_decay_mask
from capibara_eqx.transforms import Rule, convert, dequantize, quantize, report


IN, OUT = 13, 7
# Two products, and the scale of either rounding; rounding itself is exact.
SUM = {"dtype": "float32", "length": IN}


def layer_of(seed: int = 0, **options: Any) -> Any:
    return filled(BitNet158, IN, OUT, seed=seed, size=0.7, **options)


def random(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def warmed(layer, share):
    return eqx.tree_at(lambda m: m.warmup, layer, jnp.asarray(share, "float32"))


def master(layer) -> np.ndarray:
    return wide(layer.weight.weight)


def expected(layer, x):
    return oracle.bitnet(wide(x), master(layer), layer.norm.weight)


@eqx.filter_jit
def run(layer, x):
    return layer(x)


@pytest.mark.parametrize("seed", range(3))
def test_values(seed):
    layer, x = layer_of(seed), random((6, IN), seed)
    want = expected(layer, x)
    assert_close(run(layer, x), want, **SUM)
    assert_close(run(layer.quantize(), x), want, **SUM)


def test_values_in_float64():
    with enable_x64():
        layer = filled(BitNet158, IN, OUT, seed=0, size=0.7, dtype=jnp.float64)
        x = random((5, IN), dtype="float64")
        want = expected(layer, x)
        assert_close(run(layer, x), want, dtype="float64", length=IN)
        assert_close(run(layer.quantize(), x), want, dtype="float64", length=IN)


@eqx.filter_jit
def packed(layer):
    return layer.get_weights(), layer.quantize()


# Few shapes: each of them is compiled.
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 1), (9, 6), (2, 11)]))
def test_codes(seed, shape):
    rows, columns = shape
    layer = filled(BitNet158, columns, rows, seed=seed, size=0.3)
    codes, gamma = oracle.ternary(master(layer))
    got, small = packed(layer)
    assert got.dtype == jnp.int8
    np.testing.assert_array_equal(got, codes)
    assert isinstance(small.weight, TernaryArray)
    np.testing.assert_array_equal(small.get_weights(), codes)
    assert_close(
        small.weight.scale[0, 0], gamma, dtype="float32", length=rows * columns
    )
    # Four codes a byte, every row from a byte of its own, and the scale.
    assert small.weight.nbytes == rows * -(-columns // 4) + 4


def test_packed_is_what_was_trained():
    """To the rounding of float32, in every dtype of the parameters and the input."""
    for dtype in ("float32", "bfloat16"):
        layer, x = layer_of(dtype=jnp.dtype(dtype)), random((4, IN))
        for y in (x, x.astype("bfloat16")):
            got, want = run(layer.quantize(), y), run(layer, y)
            assert got.dtype == want.dtype == y.dtype
            narrow = {"dtype": y.dtype, "length": 1 if y.dtype == jnp.bfloat16 else IN}
            assert_close(got.astype("float32"), want.astype("float32"), **narrow)


@pytest.mark.parametrize("scale", ["absmean", "seed", "l2", "learned"])
def test_transforms_take_it(scale):
    layer, x = layer_of(scale=scale), random((4, IN))
    small = convert({"map": layer})["map"]
    assert jax.tree.structure(small) == jax.tree.structure(layer.quantize())
    assert small.weight.spec == Ternary(scale, activations="int8")
    for left, right in zip(
        jax.tree.leaves(small), jax.tree.leaves(layer.quantize()), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    assert_close(run(small, x), run(layer, x), **SUM)
    (entry,) = report(small).entries
    assert (entry.path, entry.shape) == ("weight", (OUT, IN))
    assert entry.nbytes == OUT * 4 + 4
    whole = dequantize(small)
    assert_close(whole.weight, dequantize(layer).weight, dtype="float32")


def test_a_float_layer_is_a_map_behind_a_norm():
    layer, x = layer_of(use_quantization=False), random((4, IN))
    want = rms_norm(wide(x), wide(layer.norm.weight)) @ wide(layer.weight).T
    assert_close(run(layer, x), want, **SUM)
    small, found = quantize(layer, [Rule("weight", Ternary(activations="int8"))])
    assert found.entries[0].path == "weight"
    for packed in (small, layer.quantize()):
        codes, gamma = oracle.ternary(wide(layer.weight))
        np.testing.assert_array_equal(packed.get_weights(), codes)
        assert_close(packed.weight.dense(), gamma * codes, dtype="float32", length=IN)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.slow
def test_more_bits(bits):
    layer, x = layer_of(quantization_bits=bits), random((4, IN))
    rows = [oracle.affine_row(row, bits, True, bits > 4) for row in master(layer)]
    step = np.array([[step] for _, step, _ in rows])
    got = np.asarray(layer.get_weights())
    assert got.dtype == np.int8
    # In a full range the largest value lies between two codes.
    assert np.max(np.abs(master(layer) / step - got)) <= 0.5 + 2.0**-20
    assert np.min(got) >= (-(2 ** (bits - 1)) if bits <= 4 else -127)
    assert np.max(got) == 2 ** (bits - 1) - 1
    weight = step * got
    tokens = rms_norm(wide(x), wide(layer.norm.weight))
    want = np.array([weight @ oracle.rounded_token(token) for token in tokens])
    assert_close(run(layer, x), want, **SUM)
    small = layer.quantize()
    assert isinstance(small.weight, AffineArray)
    np.testing.assert_array_equal(small.get_weights(), got)
    assert_close(run(small, x), want, **SUM)


def test_warming_up():
    layer, x = layer_of(), random((4, IN))
    weight, tokens = master(layer), rms_norm(wide(x), wide(layer.norm.weight))
    codes, gamma = oracle.ternary(weight)
    rounded = np.array([oracle.rounded_token(token) for token in tokens])
    for share in (0.0, 0.25, 1.0):
        mixed = weight + share * (gamma * codes - weight)
        want = (tokens + share * (rounded - tokens)) @ mixed.T
        assert_close(run(warmed(layer, share), x), want, **SUM)
        fixed = filled(BitNet158, IN, OUT, seed=0, size=0.7, warmup=share)
        assert_close(run(fixed, x), want, **SUM)
    np.testing.assert_array_equal(run(warmed(layer, 1.0), x), run(layer, x))


def test_the_warmup_is_no_parameter():
    layer = warmed(layer_of(), 0.5)
    loss = eqx.filter_jit(eqx.filter_grad(lambda m, x: jnp.sum(m(x) ** 2)))
    gradient = loss(layer, random((4, IN)))
    assert float(gradient.warmup) == 0
    mask = weight_decay_mask(layer)
    assert not mask.warmup
    assert not mask.norm.weight
    assert mask.weight.weight


def test_a_schedule_is_one_trace():
    traces = []

    @eqx.filter_jit
    def step(layer, share, x):
        traces.append(None)
        return eqx.tree_at(lambda m: m.warmup, layer, share)(x)

    layer, x = layer_of(), random((4, IN))
    found = [step(layer, jnp.asarray(share), x) for share in (0.0, 0.5, 1.0)]
    assert len(traces) == 1
    assert np.max(np.abs(found[0] - found[2])) > 1e-2


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_derivatives_pass_through_both_roundings(share):
    """Against the map in which the two roundings are shifts that do not move."""
    rng = np.random.default_rng(4)
    point = {
        "x": rng.standard_normal((3, 5)),
        "norm": 1 + 0.3 * rng.standard_normal(5),
        "weight": rng.standard_normal((2, 5)),
    }
    with enable_x64():
        layer = filled(BitNet158, 5, 2, seed=0, size=1.0, dtype=jnp.float64)

    tokens = rms_norm(point["x"], point["norm"])
    codes, gamma = oracle.ternary(point["weight"])
    shift = share * (np.array([oracle.rounded_token(t) for t in tokens]) - tokens)
    weight_shift = share * (gamma * codes - point["weight"])

    def function(point):
        new = (point["norm"], point["weight"], share)
        changed = eqx.tree_at(
            lambda m: (m.norm.weight, m.weight.weight, m.warmup), layer, new
        )
        return jnp.sum(jnp.sin(changed(point["x"])))

    def loop(point):
        seen = rms_norm(point["x"], point["norm"]) + shift
        return float(np.sum(np.sin(seen @ (point["weight"] + weight_shift).T)))

    check_first_order(function, loop, point)
    check_second_order(function, loop, point)


def test_gradients_are_those_of_the_rounded_product():
    """dW = g^T x_q and, in front of the norm, dx = g W_q, in closed form."""
    layer, x = layer_of(), random((4, IN))
    g = random((4, OUT), 1)
    plain = eqx.tree_at(lambda m: m.norm.weight, layer, jnp.ones(IN))

    def product(weight, y):
        return jnp.sum(g * FakeQuantArray.of(weight, layer.spec).product(y))

    tokens = rms_norm(wide(x))
    rounded = np.array([oracle.rounded_token(token) for token in tokens])
    codes, gamma = oracle.ternary(master(layer))
    weight = plain.weight.weight
    of_weight, of_input = jax.grad(product, (0, 1))(weight, plain.norm(x))
    assert_close(of_weight, wide(g).T @ rounded, **SUM)
    assert_close(of_input, wide(g) @ (gamma * codes), **SUM)
    whole = eqx.filter_grad(lambda m: jnp.sum(g * m(x)))(plain)
    assert_close(whole.weight.weight, wide(g).T @ rounded, **SUM)


def test_other_weights():
    layer, other, x = layer_of(), random((OUT, IN), 5), random((4, IN))
    codes, gamma = oracle.ternary(wide(other))
    small = layer.quantize(other)
    np.testing.assert_array_equal(small.get_weights(), codes)
    assert_close(small.weight.scale[0, 0], gamma, dtype="float32", length=IN * OUT)
    np.testing.assert_array_equal(small.norm.weight, layer.norm.weight)
    node = AffineQuantizer(8).quantize(other)
    from_node = layer.quantize(node)
    codes, _ = oracle.ternary(wide(node.dense()))
    np.testing.assert_array_equal(from_node.get_weights(), codes)
    assert run(from_node, x).shape == (4, OUT)
    assert small.quantize() is small


def test_stacked_layers_are_layers():
    """Made under `vmap`, packed, read by `scan`: a scale for each."""
    keys = jax.random.split(jax.random.key(0), 3)
    make = eqx.filter_jit(lambda key: BitNet158(IN, IN, key=key))
    stacked = eqx.filter_jit(eqx.filter_vmap(make))(keys)
    x = random((2, IN))
    arrays, rest = eqx.partition(stacked.quantize(), eqx.is_array)

    def read(x, arrays):
        return eqx.combine(arrays, rest)(x), None

    got, _ = jax.lax.scan(read, x, arrays)
    for key in keys:
        x = run(make(key).quantize(), x)
    assert_close(got, x, **SUM)
    assert stacked.get_weights().shape == (3, IN, IN)
