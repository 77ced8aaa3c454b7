"""Nodes that stand for weights: they answer as the array that they stand for."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.derivatives import check_gradient
from support.precision import enable_x64
from support.quant_cases import (
    IN,
    OUT,
    SPECS,
    bytes_of,
    compiled,
    random,
    seeds,
    weight_of,
    wide,
)
from support.tolerances import assert_close

from capibara_eqx.arrays import (
    Affine,
    AffineArray,
    FakeQuantArray,
    Ternary,
    TernaryArray,
    apply_weight,
    as_array,
    is_weight,
)


NAMES = ("int4 g3", "int8 asymmetric g2 a8", "int2 full tensor", "ternary base3")


@functools.cache
def node_of(name: str, fake: bool = False, dtype: str = "float32") -> Any:
    weight = jnp.asarray(weight_of(0, power=0), dtype)
    if fake:
        return FakeQuantArray.of(weight, SPECS[name])
    return compiled()(weight, SPECS[name])


nodes = pytest.mark.parametrize(
    "node",
    [*(node_of(name) for name in NAMES), node_of("int4 g3", True)],
    ids=[*NAMES, "fake"],
)
INDICES = [
    *(0, -1, 9, -9, np.int64(2), np.uint8(1), np.array([2, 0, -1])),
    *(slice(1, 3), (0, 1), (slice(None), 2), (0, slice(2, 5)), None, ..., True),
    np.array([True, False, True]),
]


@nodes
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_takes_what_it_takes_of_the_array(node, index):
    """Out of range too: jax takes the last row, or from the end the first."""
    np.testing.assert_array_equal(node[index], node.dense()[index])


@nodes
def test_traced_indices(node):
    dense = node.dense()
    look_up = eqx.filter_jit(lambda node, i: node[i])
    for i in (0, -2, 7, -7):
        np.testing.assert_array_equal(look_up(node, jnp.array(i)), dense[i])
    ids = jnp.array([[0, 2], [1, 1]], "uint8")
    np.testing.assert_array_equal(look_up(node, ids), dense[ids])
    rows = jax.vmap(lambda i: node[i])(jnp.arange(3))
    np.testing.assert_array_equal(rows, dense)


@nodes
def test_what_layers_use_of_a_matrix(node):
    dense, x = node.dense(), random((IN,))
    close = functools.partial(assert_close, dtype="float32", length=IN)
    if node.spec.activations is None:
        close(node @ x, wide(dense) @ wide(x))
        close(node @ random((IN, 4)), wide(dense) @ wide(random((IN, 4))))
        close(apply_weight(node, random((2, 4, IN))), random((2, 4, IN)) @ dense.T)
    close(random((2, OUT)) @ node, wide(random((2, OUT))) @ wide(dense))
    close(node @ random((2, IN, 4)), jnp.matmul(dense, random((2, IN, 4))))
    np.testing.assert_array_equal(node.T, dense.T)
    np.testing.assert_array_equal(jnp.sin(node), jnp.sin(dense))
    np.testing.assert_array_equal(as_array(node), dense)
    close(jnp.einsum("oi,i->o", node, x), wide(dense) @ wide(x))
    assert (node.shape, node.ndim, node.size) == ((OUT, IN), 2, OUT * IN)
    assert is_weight(node)
    assert not is_weight(dense)


@nodes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype(node, dtype):
    other = node.astype(dtype)
    assert other.dtype == other.dense().dtype == other[0].dtype == dtype
    np.testing.assert_array_equal(other.dense(), node.dense().astype(dtype))
    # The product is that of the codes, whatever the dtype that they stand for.
    np.testing.assert_array_equal(other @ random((IN,)), node @ random((IN,)))
    assert (other @ random((IN,), dtype="bfloat16")).dtype == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fake", [False, True], ids=["packed", "fake"])
@pytest.mark.slow
def test_a_stack_answers_by_vmap_and_scan(name, fake):
    stack = jnp.asarray(weight_of(5, (2, OUT, IN), power=0))
    node = (
        FakeQuantArray.of(stack, SPECS[name])
        if fake
        else compiled()(stack, SPECS[name])
    )
    x = random((2, IN))
    batched = eqx.filter_jit(eqx.filter_vmap(lambda node, x: node @ x))(node, x)
    scanned = eqx.filter_jit(
        lambda node, x: jax.lax.scan(lambda c, p: (c, p[0] @ p[1]), 0, (node, x))[1]
    )(node, x)
    for i in range(2):
        alone = compiled()(jnp.asarray(np.asarray(stack)[i]), SPECS[name])
        want = eqx.filter_jit(lambda node, x: node @ x)(alone, random((2, IN))[i])
        assert_close(batched[i], want, dtype="float32", length=IN)
        assert_close(scanned[i], want, dtype="float32", length=IN)
        np.testing.assert_array_equal(node[i], alone.dense())


@pytest.mark.parametrize("name", ["int4 g3", "int3 asymmetric", "ternary base3"])
@pytest.mark.parametrize("read", ["product", "dense", "rows"])
def test_gradients_of_scales_and_inputs(name, read):
    with enable_x64():
        weight = jnp.asarray(weight_of(0, power=0), "float64")
        node = compiled()(weight, SPECS[name])
        ones = eqx.tree_at(lambda node: node.scale, node, jnp.ones_like(node.scale))
        steps = wide(ones.dense())
    width = getattr(node.spec, "group_size", None) or IN

    def value(point):
        there = eqx.tree_at(lambda node: node.scale, node, point["scale"])
        if read == "product":
            return jnp.sum(jnp.sin(there @ point["x"]))
        if read == "dense":
            return jnp.sum(jnp.sin(there.dense() @ point["x"]))
        return jnp.sum(jnp.sin(there[jnp.array([1, 0])] @ point["x"]))

    def by_hand(point):
        each = np.repeat(point["scale"], width, axis=1)[:, :IN]
        y = (steps * each) @ point["x"]
        return float(np.sum(np.sin(y[:2] if read == "rows" else y)))

    rng = np.random.default_rng(0)
    check_gradient(value, by_hand, {"scale": wide(node.scale), "x": rng.random(IN)})


@settings(max_examples=60)
@given(
    seed=seeds,
    name=st.sampled_from(list(SPECS)),
    shape=st.sampled_from([(1, 2), (3, 7), (4, 8), (2, 3, 10)]),
)
def test_bytes_are_those_of_the_formula(seed, name, shape):
    """`bits` a code, a step a group, `bits` a zero point; each row in whole bytes."""
    del seed
    spec = SPECS[name]
    node = jax.eval_shape(lambda w: compiled()(w, spec), jnp.zeros(shape))
    want = bytes_of(spec, shape)
    leaves = jax.tree.leaves(node)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == want
    assert all(
        leaf.dtype in (jnp.uint8, spec.scale_dtype or "float32") for leaf in leaves
    )
    assert compiled()(jnp.zeros(shape), spec).nbytes == want


@pytest.mark.parametrize("spec", [Affine(4, group_size=4), Affine(8), Ternary()])
def test_a_matrix_sharded_along_the_input_is_decoded_where_it_lies(spec):
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    node = compiled()(random((8, 64)), spec)

    def place(leaf):
        cut = leaf.shape[-1] % 4 == 0
        return jax.device_put(
            leaf, NamedSharding(mesh, P(None, "model" if cut else None))
        )

    placed = jax.tree.map(place, node)
    target = NamedSharding(mesh, P(None, "model"))
    decode = jax.jit(lambda node: node.dense(), out_shardings=target)
    text = decode.lower(placed).compile().as_text() or ""
    assert not any(word in text for word in ("all-to-all", "all-gather", "all-reduce"))
    np.testing.assert_array_equal(decode(placed), node.dense())
    y = jax.jit(lambda node, x: node @ x)(placed, random((64,)))
    assert_close(
        y, wide(node.dense()) @ wide(random((64,))), dtype="float32", length=64
    )


def test_types_of_nodes():
    assert isinstance(node_of("int4 g3"), AffineArray)
    assert isinstance(node_of("ternary base3"), TernaryArray)
