"""Adapters against loops in float64, and what else a weight owes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lora_oracle import adapter_of, gradients, moved_adapters, whole
from support.tolerances import as_wide, assert_close, tolerance

from capibara_eqx.arrays import NM, Affine, LoRA, LoRAArray, Ternary, compress


KEY = jax.random.key(0)
SPECS = {
    "lora": LoRA(2, alpha=3),
    "rslora": LoRA(3, alpha=4.5, rs=True),
    "dora": LoRA(2, dora=True),
    "rsdora": LoRA(1, alpha=0.5, rs=True, dora=True),
}
# Outputs and inputs, and the axes of a batch: odd sizes, each compiled once.
MATRICES = [
    (SPECS["lora"], (3, 7), ()),
    (SPECS["rslora"], (6, 5), (2, 3)),
    (SPECS["dora"], (3, 7), (4,)),
    (SPECS["rsdora"], (6, 5), ()),
]
STACKS = [(SPECS["lora"], (2, 4, 5)), (SPECS["rsdora"], (2, 3, 3, 4))]
seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int, dtype: Any = "float32") -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def node_of(spec: LoRA, seed: int, *shape: int, dtype: Any = "float32") -> LoRAArray:
    """An adapter that is zero nowhere, without compiling anything."""
    *stack, out, size = shape
    return LoRAArray(
        base=normal(seed, *shape, dtype=dtype),
        a=normal(seed + 1, *stack, spec.rank, size),
        b=normal(seed + 2, *stack, out, spec.rank),
        magnitude=normal(seed + 3, *stack, out) if spec.dora else None,
        spec=spec,
    )


dense = eqx.filter_jit(lambda node: node.dense())
product = eqx.filter_jit(lambda node, x: node.product(x))
rows = eqx.filter_jit(lambda node, index: node[index])


@eqx.filter_jit
def everything(node, x, g, index):
    """The array, a product, its gradients for `g`, and rows."""

    def loss(both):
        node, x = both
        y = node.product(x)
        return jnp.sum(g * y), y

    (of_node, of_x), y = eqx.filter_grad(loss, has_aux=True)((node, x))
    return node.dense(), y, of_node, of_x, node[index]


@settings(max_examples=50)
@given(case=st.sampled_from(MATRICES), seed=seeds)
def test_all_of_a_matrix_is_that_of_the_loop(case, seed):
    spec, (out, size), batch = case
    node = node_of(spec, seed, out, size)
    x, g = normal(seed + 4, *batch, size), normal(seed + 5, *batch, out)
    index = np.random.default_rng(seed).integers(0, out, batch)
    got = everything(node, x, g, jnp.asarray(index, "int32"))
    matrix = whole(adapter_of(node))
    size_of_terms = float(np.max(np.abs(matrix)) * np.max(np.abs(x)))
    assert_close(got[0], matrix, dtype="float32", length=8, terms=1)
    want = as_wide(x) @ matrix.T
    assert_close(got[1], want, dtype="float32", length=16, terms=size_of_terms)
    assert_close(got[4], matrix[index], dtype="float32", length=8, terms=1)
    flat = as_wide(x).reshape(-1, size), as_wide(g).reshape(-1, out)
    for name, value in gradients(adapter_of(node), *flat).items():
        of = got[3] if name == "x" else getattr(got[2], name)
        terms = float(np.max(np.abs(g)) * max(size_of_terms, np.max(np.abs(x)), 1))
        value = value.reshape(of.shape)
        assert_close(of, value, dtype="float32", length=64, terms=terms, name=name)


@settings(max_examples=50)
@given(case=st.sampled_from(STACKS), seed=seeds)
def test_the_arrays_of_a_stack_are_those_of_the_loop(case, seed):
    spec, shape = case
    node = node_of(spec, seed, *shape)
    want = whole(adapter_of(node))
    assert_close(dense(node), want, dtype="float32", length=8, terms=1)
    assert node.shape == shape
    assert node.dtype == jnp.float32


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_the_second_derivative_is_that_of_a_bilinear_map(name):
    node = node_of(SPECS[name], 0, 3, 7)
    x, g = normal(2, 4, 7), normal(3, 4, 3)
    direction = normal(4, *node.a.shape)

    def of_b(a):
        def loss(b):
            moved = eqx.tree_at(lambda n: (n.a, n.b), node, (a, b))
            return jnp.sum(g * moved.product(x))

        return jax.grad(loss)(node.b)

    _, got = jax.jit(lambda a, d: jax.jvp(of_b, (a,), (d,)))(node.a, direction)
    scale = adapter_of(node).scale
    want = scale * as_wide(g).T @ (as_wide(x) @ as_wide(direction).T)
    assert_close(got, want, dtype="float32", length=28)


@pytest.mark.parametrize("spec", [Affine(4, group_size=3), Ternary(), NM(2, 4)])
def test_the_base_may_be_compressed(spec):
    weight = normal(0, 6, 8)
    base = compress(weight, spec)
    node = LoRAArray.of(base, LoRA(2, dora=True), key=KEY)
    node = moved_adapters(node, 1)
    matrix = whole(adapter_of(node))
    x = normal(2, 3, 8)
    assert_close(dense(node), matrix, dtype="float32", length=8)
    assert_close(product(node, x), as_wide(x) @ matrix.T, dtype="float32", length=16)
    index = jnp.array([5, 0, 5])
    assert_close(rows(node, index), matrix[[5, 0, 5]], dtype="float32", length=8)
    assert node.nbytes == base.nbytes + 4 * (2 * 8 + 6 * 2 + 6)


def test_matmul_is_the_product():
    node = node_of(LoRA(2), 0, 3, 7)
    x = normal(1, 7)
    want = as_wide(dense(node)) @ as_wide(x)
    assert_close(node @ x, want, dtype="float32", length=16)
    assert_close(node @ x[:, None], want[:, None], dtype="float32", length=16)


def test_narrow_inputs_meet_the_whole_adapter():
    """The update is summed in float32, though the input and result are narrow."""
    node = node_of(LoRA(2, dora=True), 0, 3, 7, dtype="bfloat16")
    assert node.a.dtype == jnp.float32
    x = normal(1, 4, 7, dtype="bfloat16")
    y = product(node, x)
    assert y.dtype == jnp.bfloat16
    want = as_wide(x) @ whole(adapter_of(node)).T
    assert_close(y, want, dtype="bfloat16")
    assert (
        LoRAArray.of(node.base, LoRA(2, dtype="bfloat16"), key=KEY).a.dtype
        == "bfloat16"
    )


def test_another_dtype_is_that_of_the_base():
    node = LoRAArray.of(compress(normal(0, 3, 7), Affine(8)), LoRA(2), key=KEY)
    assert node.astype("bfloat16").dtype == jnp.bfloat16
    assert node.astype("bfloat16").dense().dtype == jnp.bfloat16


def test_rows_of_zeros_are_no_nan():
    """A dead output has no direction that DoRA could scale."""
    weight = normal(0, 3, 7).at[1].set(0)
    node = LoRAArray.of(weight, LoRA(2, dora=True), key=KEY)
    x = normal(1, 4, 7)
    np.testing.assert_array_equal(dense(node)[1], 0)
    _, _, of_node, of_x, _ = everything(node, x, normal(2, 4, 3), jnp.arange(3))
    for leaf in [*jax.tree.leaves(eqx.filter(of_node, eqx.is_array)), of_x]:
        assert np.all(np.isfinite(leaf))


@settings(max_examples=50)
@given(case=st.sampled_from([(0.25, False), (0.5, True)]), seed=seeds)
def test_dropout_zeroes_inputs_of_the_adapter_alone(case, seed):
    """With one input a token, the adapter's part is 0 or 1 / (1 - p) of what it was."""
    p, dora = case
    node = node_of(LoRA(1, dropout=p, dora=dora), seed, 1, 1)
    key = jax.random.key(seed)
    y = product(node.with_key(key), jnp.ones((9, 1)))
    weight, a, b, m, scale = adapter_of(node)
    update = scale * b @ a
    factor = 1.0 if m is None else m / np.abs(weight + update)
    outcomes = factor * np.concatenate([weight, weight + update / (1 - p)])
    errors = np.min(np.abs(as_wide(y) - outcomes.T), axis=1)
    terms = np.max(np.abs(factor) * (np.abs(weight) + 2 * np.abs(update)))
    assert np.max(errors) <= tolerance("float32") * terms


def test_the_share_that_dropout_keeps():
    node = node_of(LoRA(1, dropout=0.25), 0, 1, 1)
    one = jnp.ones((1, 1))
    node = eqx.tree_at(lambda n: (n.base, n.a, n.b), node, (0 * one, one, one))
    y = np.asarray(product(node.with_key(KEY), jnp.ones((20_000, 1))))
    # Five standard deviations of a share of 0.75 among 20,000.
    assert abs(np.mean(y != 0) - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 20_000)
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)
    off = eqx.nn.inference_mode(node.with_key(KEY))
    np.testing.assert_array_equal(product(off, jnp.ones((5, 1))), 1)


def test_every_matrix_of_a_stack_drops_other_inputs():
    node = node_of(LoRA(2, dropout=0.5), 0, 2, 3, 40).with_key(KEY)
    assert node.key is not None
    first = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, node)
    again = eqx.tree_at(lambda n: n.key, first, node.key[1])
    x = normal(2, 40)
    assert np.max(np.abs(product(first, x) - product(again, x))) > 0.1
    both = eqx.filter_jit(eqx.filter_vmap(lambda n: n.product(x)))(node)
    assert_close(both[0], product(first, x), dtype="float32", length=40)
