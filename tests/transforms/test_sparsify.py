"""Zeros by score, and densities by layer, against loops in NumPy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import refused
from support.quick import filled
from support.sparsity_oracle import erk, nm_mask, share_mask

from capibara_eqx.arrays import SparseArray
from capibara_eqx.layers import MLP, Linear
from capibara_eqx.transforms import (
    NM,
    Affine,
    Rule,
    Unstructured,
    erk_rules,
    quantize,
    sparsify,
)


seeds = st.integers(0, 2**16)
run = eqx.filter_jit(sparsify)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(3, 5), (2, 4, 6)]),
    density=st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    coarse=st.booleans(),
    seed=seeds,
)
@pytest.mark.slow
def test_a_share_of_each_matrix_stays(shape, density, coarse, seed):
    weight = random(shape, seed)
    weight = jnp.asarray(np.round(weight)) if coarse else weight
    rules = [Rule("a", Unstructured(density))]
    sparse, report = run({"a": weight, "b": jnp.ones(3)}, rules)
    size = shape[-1] * shape[-2]
    values = np.asarray(weight)
    mask = share_mask(np.abs(values), max(1, round(density * size)))
    np.testing.assert_array_equal(sparse["a"], np.where(mask, values, 0))
    np.testing.assert_array_equal(sparse["b"], np.ones(3))
    (entry,) = report.entries
    assert entry.nbytes == entry.original_bytes == values.nbytes
    np.testing.assert_allclose(entry.density, np.mean(mask & (values != 0)), rtol=1e-6)
    assert [path for path, *_ in report.left_alone] == ["b"]


@settings(max_examples=50)
@given(seed=seeds, stacked=st.booleans())
def test_groups_by_scores_of_wanda(seed, stacked):
    weight = random((2, 3, 8) if stacked else (3, 8), seed)
    norms = np.abs(random((8,), seed + 1))
    scores = {"a": jnp.abs(weight) * np.broadcast_to(norms, weight.shape)}
    sparse, _ = run({"a": weight}, [Rule("a", NM(2, 4))], scores)
    mask = nm_mask(np.asarray(scores["a"]), 2, 4)
    np.testing.assert_array_equal(sparse["a"], np.where(mask, weight, 0))


def test_a_convolution_is_read_as_it_is_compressed():
    conv = filled(eqx.nn.Conv2d, 2, 3, (2, 3), seed=0, size=1.0)
    rules = [Rule(".*weight", NM(2, 4))]
    sparse, _ = sparsify(conv, rules)
    flat = np.asarray(conv.weight).reshape(3, 12)
    expected = np.where(nm_mask(flat, 2, 4), flat, 0)
    np.testing.assert_array_equal(sparse.weight.reshape(3, 12), expected)
    packed, _ = quantize(conv, rules)
    np.testing.assert_array_equal(packed.matrix.dense(), expected)
    half, _ = sparsify(conv, [Rule(".*weight", Unstructured(0.25))])
    assert int((half.weight != 0).sum()) == 9


def test_quantize_keeps_what_is_left():
    model = filled(MLP, 8, 12, seed=0, size=1.0)
    rules = [Rule(".*up.*weight", NM(1, 4)), Rule(".*weight", None)]
    params = eqx.filter(model, eqx.is_inexact_array)
    scores = jax.tree.map(lambda leaf: random(leaf.shape, leaf.size), params)
    sparse, report = sparsify(model, rules, scores)
    assert eqx.tree_equal(sparse.down_proj, model.down_proj)
    packed, found = quantize(sparse, rules)
    assert isinstance(packed.up_proj.weight, SparseArray)
    np.testing.assert_array_equal(packed.up_proj.weight.dense(), sparse.up_proj.weight)
    assert "1:4" in str(report)
    assert found.nbytes < report.nbytes == report.original_bytes
    sqnr = report.entries[0].sqnr
    assert sqnr is not None
    assert 0 < float(sqnr) < 20


def test_random_scores_are_no_choice_by_size():
    weight = random((40, 40))
    scores = jax.random.uniform(jax.random.key(0), weight.shape)
    sparse, _ = run(weight, [Rule(".*", Unstructured(0.25))], scores)
    kept = np.asarray(weight)[np.asarray(sparse) != 0]
    assert len(kept) == 400
    # The mean size of a normal number, not that of the largest quarter (1.27 times 1).
    assert abs(np.abs(kept).mean() - np.sqrt(2 / np.pi)) < 5 * 0.6 / 20


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    density=st.floats(0.02, 1),
)
def test_densities_of_erdos_and_renyi(sizes, density):
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    model = {f"w{i}": np.zeros(shape, "float32") for i, shape in enumerate(shapes)}
    rules = erk_rules(model, [Rule(r"w\d+", Unstructured(density))])
    assert [rule.pattern for rule in rules] == list(model)
    found = [rule.spec.density for rule in rules]
    np.testing.assert_allclose(found, erk(shapes, density), rtol=1e-6)
    kept = sum(d * a * b for d, (a, b) in zip(found, shapes, strict=True))
    np.testing.assert_allclose(kept, density * sum(a * b for a, b in shapes), rtol=1e-6)


def test_rules_that_are_not_shared_out_stay():
    conv = filled(eqx.nn.Conv2d, 4, 8, 3, seed=0, size=1.0)
    linear = filled(Linear, 8, 100, seed=0, size=1.0)
    rules = [Rule("0/.*", None), Rule(".*weight", Unstructured(0.2))]
    first, *shared = erk_rules([linear, conv, linear], rules)
    assert first == rules[0]
    assert [rule.pattern for rule in shared] == ["1/weight", "2/weight"]
    densities = [rule.spec.density for rule in shared]
    want = erk([(8, 4, 3, 3), (100, 8)], 0.2)
    np.testing.assert_allclose(densities, want, rtol=1e-6)


@pytest.mark.errors
def test_refusals():
    model = {"a": jnp.ones((3, 6)), "b": jnp.ones((4, 8))}
    with refused("sparsify", "groups of 4", "'a'", "6 inputs"):
        sparsify(model, [Rule("a", NM(2, 4))])
    with refused("sparsify", "Unstructured", "Affine"):
        sparsify(model, [Rule("a", Affine(4))])
    packed, _ = quantize(model, [Rule("b", NM(2, 4))])
    with refused("sparsify", "'b'", "SparseArray", "dequantize"):
        sparsify(packed, [Rule("b", NM(2, 4))])
    with refused("`scores`", "(3, 6)", "'a'", "nothing"):
        sparsify(model, [Rule("a", Unstructured(0.5))], {"b": jnp.ones((4, 8))})
    with refused("`scores`", "(3, 6)", "'a'", "(6, 3)"):
        sparsify(model, [Rule("a", Unstructured(0.5))], {"a": jnp.ones((6, 3))})
    with refused("sparsify", "'a'", "not finite"):
        sparsify({"a": jnp.full((2, 2), jnp.nan)}, [Rule("a", Unstructured(0.5))])
    with refused("sparsify", "'c'", "matches no weight"):
        sparsify(model, [Rule("c", Unstructured(0.5))])
    density: Any
    for density in (0.0, -1.0, 1.5, float("nan"), "half"):
        with refused("`density`"):
            Unstructured(density)
