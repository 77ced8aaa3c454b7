"""What holds of a mixture of experts and its losses whatever the numbers are."""

import functools
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import expert_oracle
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import MoE, SwiGLU, update_selection_bias


IMPLEMENTATIONS = ["ragged", "scan", "gather", "dense", "reference", "capacity"]
TOKENS, D, EXPERTS, TOP_K = 7, 3, 4, 2
seeds = st.integers(0, 2**32 - 1)


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def wide(x):
    return np.asarray(x, np.float64)


def make(seed, **options):
    """Experts whose scores differ enough to tell them apart."""
    layer = filled(MoE, D, EXPERTS, TOP_K, 2, seed=seed, size=0.4, **options)
    weight = random(layer.router.weight.shape, seed)
    return eqx.tree_at(lambda m: m.router.weight, layer, weight)


@functools.cache
def compiled():
    return eqx.filter_jit(lambda layer, x: layer(x))


def routed(layer, x, bias=0.0):
    logits = wide(x) @ wide(layer.router.weight).T
    kinds = layer.top_k, layer.score, layer.renormalize
    return logits, *expert_oracle.route(logits, bias, *kinds)


@settings(max_examples=50)
@given(seed=seeds, implementation=st.sampled_from(IMPLEMENTATIONS))
@pytest.mark.slow
def test_every_implementation_is_the_dense_reference(seed, implementation):
    factor = float(EXPERTS) if implementation == "capacity" else None
    layer = make(seed, implementation=implementation, capacity_factor=factor)
    x = random((TOKENS, D), seed)
    y, routing = compiled()(layer, x)
    _, indices, weights = routed(layer, x)
    arrays = {name: wide(getattr(layer, name)) for name in ("gate", "up", "down")}
    arrays |= {"x": wide(x), "weights": weights}
    want, _ = expert_oracle.experts(arrays, indices)
    assert_close(y, want, dtype="float32", length=12, terms=1.0)
    # Every token has all of its choices, and the load is their share.
    counts = np.bincount(indices.ravel(), minlength=EXPERTS)
    assert counts.sum() == TOKENS * TOP_K
    assert_close(routing.load * (TOKENS * TOP_K), counts, dtype="float32")
    assert routing.dropped == 0


@settings(max_examples=50)
@given(seed=seeds)
def test_one_expert_is_a_gated_unit(seed):
    layer = filled(MoE, D, 1, 1, 5, seed=seed, size=0.4)
    unit = filled(SwiGLU, D, 5, False, seed=seed, size=0.4)
    names = ("gate", "up", "down")
    maps = [unit.gate_proj, unit.up_proj, unit.down_proj]
    weights = [jnp.asarray(np.asarray(part.weight)[None]) for part in maps]
    layer = eqx.tree_at(lambda m: [getattr(m, n) for n in names], layer, weights)
    x = random((TOKENS, D), seed)
    y, routing = compiled()(layer, x)
    silu, own = expert_oracle.ACTIVATIONS["silu"], [wide(part.weight) for part in maps]
    want = [expert_oracle.gated_unit(row, own, [0, 0, 0], silu) for row in wide(x)]
    assert_close(y, np.stack(want), dtype="float32", length=8, terms=1.0)
    assert_close(routing.balance_loss, 1.0, dtype="float32")


@settings(max_examples=50)
@given(seed=seeds, share=st.floats(0, 1))
def test_the_balance_loss_is_one_where_either_share_is_even(seed, share):
    """Of scores that are all equal; or of a load that is, whatever the scores."""
    x = random((TOKENS, D), seed)
    layer = make(seed)
    even = eqx.tree_at(lambda m: m.router.weight, layer, jnp.zeros((EXPERTS, D)))
    _, routing = compiled()(even, x)
    assert_close(routing.balance_loss, 1.0, dtype="float32", length=EXPERTS)
    # Two tokens and two choices of four experts: x and -x like opposite ones.
    pair = jnp.asarray((0.1 + np.float32(share)) * np.array([[1, 0, 0], [-1, 0, 0]]))
    weight = jnp.asarray([[2.0, 0, 0], [1, 0, 0], [-1, 0, 0], [-2, 0, 0]])
    opposite = eqx.tree_at(lambda m: m.router.weight, layer, weight)
    _, routing = compiled()(opposite, pair.astype("float32"))
    np.testing.assert_array_equal(routing.load, np.full(EXPERTS, 0.25))
    assert_close(routing.balance_loss, 1.0, dtype="float32", length=EXPERTS)


@settings(max_examples=50)
@given(seed=seeds, shift=st.floats(0.5, 20))
def test_the_z_loss_is_a_square(seed, shift):
    r"""Not below zero; logits that are all larger by $c$ add $2 c \bar z + c^2$."""
    layer = make(seed)
    x = random((TOKENS, D), seed).at[:, -1].set(1.0)
    found = []
    for c in (-shift, 0.0, shift):
        moved = np.array(layer.router.weight)
        moved[:, -1] += np.float32(c)
        other = eqx.tree_at(lambda m: m.router.weight, layer, jnp.asarray(moved))
        found.append(float(compiled()(other, x)[1].z_loss))
    logits, *_ = routed(layer, x)
    z = np.log(np.sum(np.exp(logits), axis=-1))
    c = float(np.float32(shift))
    want = [np.mean((z - c) ** 2), np.mean(z**2), np.mean((z + c) ** 2)]
    assert min(found) >= 0
    assert_close(np.array(found), np.array(want), dtype="float32", length=TOKENS)
    assert math.isclose(
        found[0] - 2 * found[1] + found[2], 2 * c**2, rel_tol=1e-4, abs_tol=1e-4
    )


@functools.cache
def gradient():
    def loss(layer, x):
        y, routing = layer(x)
        return jnp.sum(jnp.sin(y)) + sum(routing.losses().values())

    return eqx.filter_jit(eqx.filter_grad(loss))


@settings(max_examples=50)
@given(seed=seeds, size=st.floats(0, 3))
@pytest.mark.slow
def test_a_selection_bias_learns_by_no_gradient_and_weighs_nothing(seed, size):
    layer = make(seed, score="sigmoid", use_selection_bias=True)
    bias = np.asarray(size * random((EXPERTS,), seed + 1), np.float32)
    x = random((TOKENS, D), seed)

    def biased(values):
        return eqx.tree_at(lambda m: m.selection_bias, layer, jnp.asarray(values))

    of_layer = gradient()(biased(bias), x)
    np.testing.assert_array_equal(of_layer.selection_bias, np.zeros(EXPERTS))
    assert np.any(np.asarray(of_layer.router.weight) != 0)
    _, routing = compiled()(biased(bias), x)
    # The same choices by a bias that favours them far more: the same weights.
    for token in range(TOKENS):
        chosen = np.asarray(routing.indices)[token]
        strong = np.zeros(EXPERTS, np.float32)
        strong[chosen] = [4, 3]
        _, one = compiled()(biased(strong), x)
        np.testing.assert_array_equal(np.asarray(one.indices)[token], chosen)
        np.testing.assert_array_equal(
            np.asarray(one.weights)[token], np.asarray(routing.weights)[token]
        )


@settings(max_examples=50)
@given(seed=seeds, rate=st.sampled_from([0.125, 0.001]))
def test_an_expert_of_mean_load_keeps_its_bias(seed, rate):
    rng = np.random.default_rng(seed)
    bias = np.float32(rng.standard_normal(EXPERTS))
    # Quarters, eighths: sums are exact. The last has the mean of all.
    away = rng.integers(1, 16) / 128
    load = np.array(
        [0.25 + away, 0.25 - away, 0.25 + away / 2, 0.25 - away / 2], np.float32
    )
    load = np.append(load, np.float32(0.25)) * np.float32(0.8)
    bias = np.append(bias, np.float32(rng.standard_normal()))
    moved = np.asarray(
        update_selection_bias(jnp.asarray(bias), jnp.asarray(load), rate)
    )
    want = bias + np.float32(rate) * np.array([-1, 1, -1, 1, 0], np.float32)
    np.testing.assert_allclose(moved, want, rtol=1e-6)
    even = np.full(EXPERTS, 0.25, np.float32)
    same = update_selection_bias(jnp.asarray(bias[:4]), jnp.asarray(even), rate)
    np.testing.assert_array_equal(same, bias[:4])
