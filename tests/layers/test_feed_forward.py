"""Gated units and the two-layer feed-forward against float64 NumPy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import check_first_order, check_second_order
from support.expert_oracle import ACTIVATIONS, gated_unit
from support.quick import built, filled
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.layers import GLU, MLP, SwiGLU, weight_decay_mask


KEY = jax.random.key(0)
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "relu2glu": "relu2"}


def random(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


def expected_glu(layer, x, activation):
    maps = (layer.gate_proj, layer.up_proj, layer.down_proj)
    weights = [wide(m.weight) for m in maps]
    biases = [0 if m.bias is None else wide(m.bias) for m in maps]
    rows = wide(x).reshape(-1, x.shape[-1])
    y = [gated_unit(row, weights, biases, ACTIVATIONS[activation]) for row in rows]
    return np.reshape(y, x.shape)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", GATES)
def test_glu(activation, use_bias):
    layer = filled(GLU, 5, 7, activation, use_bias, seed=0, size=0.4)
    x = random((3, 2, 5))
    want = expected_glu(layer, x, GATES[activation])
    assert_close(eqx.filter_jit(layer)(x), want, dtype="float32", length=12)


def test_swiglu_is_the_glu_of_that_name():
    swiglu = built(SwiGLU, 5, 7, True, key=KEY)
    glu = built(GLU, 5, 7, "swiglu", True, key=KEY)
    assert [leaf.shape for leaf in jax.tree.leaves(swiglu)] == [
        *[(7, 5), (7,)] * 2,
        *[(5, 7), (5,)],
    ]
    x = random((4, 5))
    got = eqx.filter_jit(swiglu)(x)
    np.testing.assert_array_equal(got, eqx.filter_jit(glu)(x))
    assert_close(got, expected_glu(swiglu, x, "silu"), dtype="float32", length=12)
    bare = filled(SwiGLU, 5, 7, dtype=jnp.bfloat16, seed=0, size=1.0)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(bare)} == {"bfloat16"}


def test_one_fused_map_is_two():
    """Gate and up as one matrix, as many checkpoints store them."""
    layer = filled(GLU, 5, 7, seed=0, size=0.4)
    fused = np.concatenate([wide(layer.gate_proj.weight), wide(layer.up_proj.weight)])
    x = random((4, 5))
    gate, up = np.split(wide(x) @ fused.T, 2, axis=-1)
    want = (ACTIVATIONS["silu"](gate) * up) @ wide(layer.down_proj.weight).T
    assert_close(eqx.filter_jit(layer)(x), want, dtype="float32", length=12)


@pytest.mark.parametrize("d_out", [None, 3])
@pytest.mark.parametrize(
    ("activation", "use_bias"),
    [("gelu", True), ("silu", False), ("relu", True), ("relu2", True)],
)
def test_mlp(activation, use_bias, d_out):
    layer = filled(MLP, 5, 7, activation, use_bias, d_out, seed=0, size=0.4)
    x = random((3, 2, 5))
    up, down = layer.up_proj, layer.down_proj
    assert (up.bias is not None) == (down.bias is not None) == use_bias
    hidden = wide(x) @ wide(up.weight).T
    if up.bias is not None:
        hidden = hidden + wide(up.bias)
    want = ACTIVATIONS[activation](hidden) @ wide(down.weight).T
    if down.bias is not None:
        want = want + wide(down.bias)
    assert want.shape == (3, 2, d_out or 5)
    assert_close(eqx.filter_jit(layer)(x), want, dtype="float32", length=12)


def test_dropout_of_the_mlp_acts_on_what_is_inside():
    layer = filled(MLP, 2, 300, use_bias=False, dropout=0.25, seed=0, size=1.0)
    # Every hidden element is the same positive number, and every output their sum.
    ones = (jnp.ones((300, 2)), jnp.ones((2, 300)))
    layer = eqx.tree_at(lambda m: (m.up_proj.weight, m.down_proj.weight), layer, ones)
    x = jnp.ones((50, 2))
    full = np.asarray(eqx.filter_jit(eqx.nn.inference_mode(layer))(x))
    share = np.asarray(eqx.filter_jit(layer)(x, key=jax.random.key(1))) / full
    kept = share[:, 0] * 0.75 * 300
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert abs(np.mean(kept) - 225) < 5 * np.sqrt(300 * 0.25 * 0.75 / 50)
    np.testing.assert_array_equal(share[:, 0], share[:, 1])


@pytest.mark.parametrize("name", ["glu", "mlp"])
def test_derivatives(name):
    own: Any = (GLU, 2, 3, "geglu", True) if name == "glu" else (MLP, 2, 3)
    layer = filled(*own, seed=0, size=0.5)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    point = {f"p{i}": wide(leaf) for i, leaf in enumerate(leaves)}
    point = {"x": wide(random((3, 2))), **point}

    def function(point):
        leaves = [point[f"p{i}"] for i in range(len(point) - 1)]
        layer = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        return jnp.sum(jnp.sin(layer(point["x"])))

    def oracle(point):
        x, maps = point["x"], [point[f"p{i}"] for i in range(len(point) - 1)]
        if name == "glu":
            biases = maps[1::2]
            y = [gated_unit(r, maps[::2], biases, ACTIVATIONS["gelu"]) for r in x]
        else:
            up, up_bias, down, down_bias = maps
            y = ACTIVATIONS["gelu"](x @ up.T + up_bias) @ down.T + down_bias
        return float(np.sum(np.sin(y)))

    check_first_order(function, oracle, point)
    check_second_order(function, oracle, point)


def test_what_lies_between_two_maps_is_rounded_once():
    layer = filled(GLU, 1, 1, "geglu", seed=0, size=1.0)
    ones = [jnp.ones((1, 1))] * 3
    layer = eqx.tree_at(
        lambda m: [m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight],
        layer,
        ones,
    )
    x = jnp.linspace(-4, 4, 97, dtype="bfloat16")[:, None]
    exact = wide(x.astype("float32"))
    assert_rounded(eqx.filter_jit(layer)(x), ACTIVATIONS["gelu"](exact) * exact)


def test_biases_do_not_decay():
    glu = filled(GLU, 3, 4, use_bias=True, seed=0, size=1.0)
    for layer in (glu, filled(MLP, 3, 4, seed=0, size=1.0)):
        mask = weight_decay_mask(layer)
        assert mask.up_proj.weight
        assert not mask.up_proj.bias
        assert not mask.down_proj.bias
