"""N:M sparse weights against loops in NumPy."""

import functools
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import refused
from support.sparsity_oracle import nm_mask as nm_mask_loop
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.arrays import (
    NM,
    FakeQuantArray,
    SparseArray,
    apply_weight,
    nm_mask,
)
from capibara_eqx.layers import Linear


# n, m, dtype: few, since each is compiled.
CASES = [
    (2, 4, "float32"),
    (2, 4, "bfloat16"),
    (1, 2, "float32"),
    (3, 5, "float32"),
    (1, 1, "float32"),
    (5, 16, "bfloat16"),
]
seeds = st.integers(0, 2**16)


def random(shape, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, "float32").astype(dtype)


def wide(x):
    return np.asarray(jnp.asarray(x, "float32"), np.float64)


packed = jax.jit(SparseArray.compress, static_argnums=1)
product = jax.jit(apply_weight)


@functools.partial(jax.jit, static_argnums=1)
def found(weight, spec):
    """The mask, the packed form, its array, and the mask of that times four."""
    node = SparseArray.compress(weight, spec)
    dense = node.dense()
    return nm_mask(weight, spec), node, dense, nm_mask(4 * dense, spec)


@settings(max_examples=60)
@given(
    case=st.sampled_from(CASES),
    stack=st.sampled_from([(), (2, 2)]),
    coarse=st.booleans(),
    seed=seeds,
)
def test_the_largest_of_every_group_stay(case, stack, coarse, seed):
    n, m, dtype = case
    weight = random((*stack, 3, 3 * m), seed, dtype)
    if coarse:  # many ties
        weight = jnp.asarray(np.round(wide(weight)), dtype)
    mask, node, dense, again = found(weight, NM(n, m))
    values, mask, again = wide(weight), np.asarray(mask), np.asarray(again)
    expected = nm_mask_loop(values, n, m)
    np.testing.assert_array_equal(mask, expected)
    assert (mask.reshape(-1, m).sum(axis=1) == n).all()
    energy, whole = ((v**2).reshape(-1, m).sum(axis=1) for v in (values * mask, values))
    assert (energy >= n / m * whole * (1 - 1e-12)).all()
    # Chosen again, of values four times as large, the same stay.
    nonzero = values != 0
    np.testing.assert_array_equal(again & nonzero, mask & nonzero)
    np.testing.assert_array_equal(wide(dense), np.where(expected, values, 0))
    assert dense.dtype == node.dtype == weight.dtype
    assert node.shape == weight.shape
    assert node.density == n / m
    # Codes of 1, 2 or 4 bits.
    bits = {1: 1, 2: 1, 4: 2, 5: 4, 16: 4}[m]
    row = 3 * n * weight.dtype.itemsize + -(-3 * n * bits // 8)
    assert node.nbytes == row * int(np.prod(weight.shape[:-1]))


@settings(max_examples=50)
@given(seed=seeds)
def test_groups_are_on_their_own(seed):
    weight = random((3, 12), seed)
    order = np.random.default_rng(seed).permutation(3)

    def moved(x):
        return np.asarray(x).reshape(3, 3, 4)[:, order].reshape(3, 12)

    mask, *_ = found(weight, NM(2, 4))
    other, *_ = found(jnp.asarray(moved(weight)), NM(2, 4))
    np.testing.assert_array_equal(other, moved(mask))


def test_ties_keep_the_first():
    weight = jnp.asarray([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0]])
    expected = [[True, True, False, False] * 2]
    np.testing.assert_array_equal(nm_mask(weight, NM(2, 4)), expected)


@pytest.mark.parametrize(
    ("dtype", "share"), [("bfloat16", 0.5625), ("float32", 0.53125)]
)
def test_true_bytes_of_two_in_four(dtype, share):
    """Half of the values, and two bits a value for its place."""
    node = packed(random((8, 64), dtype=dtype), NM(2, 4))
    assert node.nbytes == share * node.size * node.dtype.itemsize
    assert node.places.size == 8 * 64 // 2 * 2 // 8


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("fake", [False, True])
def test_products_are_those_of_the_masked_weight(fake, batch):
    weight, x = random((5, 12)), random((*batch, 12), 1)
    expected = np.where(nm_mask_loop(wide(weight), 2, 4), wide(weight), 0)
    node = FakeQuantArray.of(weight, NM(2, 4)) if fake else packed(weight, NM(2, 4))
    want = wide(x) @ expected.T
    assert_close(product(node, x), want, dtype="float32", length=12)
    for other in (random((12,), 2), random((12, 3), 3)):
        assert_close(node @ other, expected @ wide(other), dtype="float32", length=12)
    rows = jnp.asarray([4, 0, 4], "int32")
    np.testing.assert_array_equal(node[rows], expected.astype("float32")[rows])
    layer = eqx.tree_at(lambda m: m.weight, Linear(12, 5, key=jax.random.key(0)), node)
    got = eqx.filter_jit(layer)(x.astype("bfloat16"))
    assert got.dtype == jnp.bfloat16
    low = wide(x.astype("bfloat16")) @ expected.T + wide(layer.bias)
    narrow = {"dtype": "bfloat16", "length": 12}
    assert_close(wide(got), low, **narrow)


def test_values_learn_and_places_stay():
    weight, x = random((4, 8)), random((3, 8), 1)
    node = packed(weight, NM(2, 4))

    def loss(values):
        own = eqx.tree_at(lambda node: node.values, node, values)
        return jnp.sum(jnp.sin(apply_weight(own, x)))

    gradient = jax.jit(jax.grad(loss))(node.values)
    mask = nm_mask_loop(wide(weight), 2, 4)
    dense = np.where(mask, wide(weight), 0)
    # Row by row, what flows into the places that are kept, in order.
    slope = np.cos(wide(x) @ dense.T).T @ wide(x)
    want = np.stack([slope[i][mask[i]] for i in range(4)])
    assert_close(gradient, want, dtype="float32", length=8)
    curvature = jax.jit(jax.grad(lambda v: jnp.sum(jax.grad(loss)(v))))(node.values)
    bend = -np.sin(wide(x) @ dense.T)  # of each output
    spread = wide(x) @ mask.T.astype(float)
    product = np.einsum("bo,bo,bi->oi", bend, spread, wide(x))
    want = np.stack([product[i][mask[i]] for i in range(4)])
    assert_close(curvature, want, dtype="float32", length=24)


def test_in_training_gradients_reach_the_whole_weight():
    weight, x = random((4, 8)), random((3, 8), 1)
    node = FakeQuantArray.of(weight, NM(2, 4))

    def loss(weight):
        own = eqx.tree_at(lambda node: node.weight, node, weight)
        return jnp.sum(jnp.sin(apply_weight(own, x)))

    dense = np.where(nm_mask_loop(wide(weight), 2, 4), wide(weight), 0)
    want = np.cos(wide(x) @ dense.T).T @ wide(x)
    gradient = jax.jit(jax.grad(loss))(weight)
    assert_close(gradient, want, dtype="float32", length=8)
    assert (np.abs(gradient)[dense == 0] > 0).all()


def test_all_of_a_group_is_the_weight_itself():
    weight = random((3, 8))
    for spec in (NM(4, 4), NM(1, 1)):
        np.testing.assert_array_equal(packed(weight, spec).dense(), weight)
        np.testing.assert_array_equal(FakeQuantArray.of(weight, spec).dense(), weight)


def test_layers_of_a_stack_are_on_their_own():
    stack, x = random((3, 4, 8)), random((4, 8), 1)
    node = packed(stack, NM(2, 4))
    single = [packed(layer, NM(2, 4)) for layer in stack]
    for index, one in enumerate(single):
        picked = jax.tree.map(lambda leaf, i=index: leaf[i], node)
        np.testing.assert_array_equal(picked.dense(), one.dense())
        assert eqx.tree_equal(picked, one)
    together = eqx.filter_vmap(lambda layer: packed(layer, NM(2, 4)))(stack)
    assert eqx.tree_equal(together, node)
    parts, static = eqx.partition(node, eqx.is_array)

    def body(carry, layer):
        return carry, apply_weight(eqx.combine(layer, static), x)

    _, scanned = jax.jit(lambda p: jax.lax.scan(body, 0, p))(parts)
    batched = eqx.filter_jit(eqx.filter_vmap(lambda node: apply_weight(node, x)))(node)
    want = np.stack([wide(x) @ wide(one.dense()).T for one in single])
    assert_close(scanned, want, dtype="float32", length=8)
    assert_close(batched, want, dtype="float32", length=8)


def test_a_file_brings_back_the_same_bits():
    node = packed(random((3, 8), dtype="bfloat16"), NM(2, 4))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, node)
    file.seek(0)
    empty = jax.tree.map(jnp.zeros_like, node)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, empty), node)


def test_products_of_bfloat16_weights_are_rounded_once():
    weight = random((5, 64), dtype="bfloat16")
    node = FakeQuantArray.of(weight, NM(2, 4))
    x = random((3, 64), 1, "bfloat16")
    dense = np.where(nm_mask_loop(wide(weight), 2, 4), wide(weight), 0)
    assert_rounded(product(node, x), wide(x) @ dense.T, length=64)


def test_torch_chooses_the_same_two_in_four():
    torch = pytest.importorskip("torch")
    pruning = pytest.importorskip("torch.ao.pruning")
    weight = np.array(random((6, 20), 3))
    linear = torch.nn.Linear(20, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
    model = torch.nn.Sequential(linear)
    sparsifier = pruning.WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    theirs = model[0].weight.detach().numpy()
    np.testing.assert_array_equal(packed(jnp.asarray(weight), NM(2, 4)).dense(), theirs)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("n", "m", "words"),
    [
        (0, 4, ("`n`", "positive")),
        (2, 0, ("`m`", "positive")),
        (2.0, 4, ("`n`", "2.0")),
        (4, 2, ("`n`", "4 of 2", "swapped")),
        (2, 512, ("`m`", "256", "512")),
    ],
)
def test_patterns_that_are_none(n, m, words):
    with refused(*words):
        NM(n, m)


@pytest.mark.errors
def test_groups_that_do_not_fit():
    for function in (SparseArray.compress, nm_mask):
        with refused("groups of 4", "6 inputs", "(3, 6)"):
            function(jnp.ones((3, 6)), NM(2, 4))
