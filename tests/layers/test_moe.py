"""The mixture of experts: routing, losses, load, and what holds whatever the values."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import expert_oracle
from support.derivatives import (
    check_first_order,
    check_second_order,
)
from support.quick import built, filled
from support.tolerances import assert_close

from capibara_eqx.layers import (
    MoE,
    SwiGLU,
    update_selection_bias,
    weight_decay_mask,
)


KEY = jax.random.key(0)
STACKED = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
seeds = st.integers(0, 2**32 - 1)


def random(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def take(x, where):
    """`x[where]` by NumPy: JAX compiles every index."""
    return jnp.asarray(np.asarray(x)[where])


def wide(x):
    return np.asarray(x, np.float64)


def make(seed=0, **options):
    """A layer of four experts whose scores differ enough to tell them apart."""
    sizes: dict[str, Any] = {"d_model": 3, "num_experts": 4, "top_k": 2, "d_ff": 2}
    layer = filled(MoE, seed=seed, size=0.4, **(sizes | options))
    weight = random(layer.router.weight.shape, seed)
    layer = eqx.tree_at(lambda m: m.router.weight, layer, weight)
    if layer.selection_bias is None:
        return layer
    zeros = jnp.zeros_like(layer.selection_bias)
    return eqx.tree_at(lambda m: m.selection_bias, layer, zeros)


@functools.cache
def compiled():
    return eqx.filter_jit(lambda layer, x, mask=None: layer(x, mask=mask))


def expected(layer, x, bias: Any = 0.0):
    """Output, choices, weights and logits of a two-dimensional input."""
    logits = wide(x) @ wide(layer.router.weight).T
    indices, weights = expert_oracle.route(
        logits, bias, layer.top_k, layer.score, layer.renormalize
    )
    arrays = {
        n: wide(getattr(layer, n)) for n in STACKED if getattr(layer, n) is not None
    }
    y, _ = expert_oracle.experts({"x": wide(x), "weights": weights, **arrays}, indices)
    if layer.shared is not None:
        maps = [layer.shared.gate_proj, layer.shared.up_proj, layer.shared.down_proj]
        biases = [0 if m.bias is None else wide(m.bias) for m in maps]
        own = [wide(m.weight) for m in maps]
        silu = expert_oracle.ACTIVATIONS["silu"]
        y = y + [expert_oracle.gated_unit(r, own, biases, silu) for r in wide(x)]
    return y, indices, weights, logits


OPTIONS = {
    "plain": {},
    "raw scores": {"renormalize": False},
    "sigmoid": {"score": "sigmoid", "use_bias": True, "shared_d_ff": 3},
    "raw sigmoid": {"score": "sigmoid", "renormalize": False, "top_k": 3},
    "scan": {"implementation": "scan"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_losses(name):
    layer, x = make(**OPTIONS[name]), random((9, 3))
    y, routing = compiled()(layer, x)
    want, indices, weights, logits = expected(layer, x)
    close = functools.partial(assert_close, dtype="float32", length=12)
    close(y, want)
    np.testing.assert_array_equal(routing.indices, indices)
    close(routing.weights, weights)
    load, balance, z = expert_oracle.losses(logits, indices, layer.score)
    close(routing.load, load)
    close(routing.balance_loss, balance)
    close(routing.z_loss, z)
    assert set(routing.losses()) == {"balance", "router_z"}
    assert routing.losses()["balance"] is routing.balance_loss
    assert routing.losses()["router_z"] is routing.z_loss
    assert routing.dropped == 0


@settings(max_examples=50)
@given(seed=seeds, score=st.sampled_from(["softmax", "sigmoid"]))
def test_all_experts_are_the_dense_mixture(seed, score):
    layer, x = make(seed, top_k=4, score=score), random((5, 3), seed)
    y, routing = compiled()(layer, x)
    logits = wide(x) @ wide(layer.router.weight).T
    scores = expert_oracle.softmax(logits)
    if score == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
        scores = scores / scores.sum(-1, keepdims=True)
    gate = np.einsum("td,efd->tef", wide(x), wide(layer.gate))
    up = np.einsum("td,efd->tef", wide(x), wide(layer.up))
    hidden = expert_oracle.ACTIVATIONS["silu"](gate) * up * scores[..., None]
    want = np.einsum("tef,edf->td", hidden, wide(layer.down))
    assert_close(y, want, dtype="float32", length=12)
    np.testing.assert_array_equal(routing.load, np.full(4, 0.25))
    assert_close(routing.balance_loss, 1.0, dtype="float32", length=4)


@settings(max_examples=50)
@given(seed=seeds)
def test_the_names_of_experts_and_the_order_of_tokens_do_not_matter(seed):
    layer, x = make(seed), random((7, 3), seed)
    rng = np.random.default_rng(seed)
    names, order = rng.permutation(4), rng.permutation(7)

    def parts(m):
        return [m.router.weight, m.gate, m.up, m.down]

    leaves = [take(leaf, names) for leaf in parts(layer)]
    renamed = eqx.tree_at(parts, layer, leaves)
    y, routing = compiled()(layer, x)
    got, moved = compiled()(renamed, take(x, order))
    assert_close(got, take(y, order), dtype="float32", length=12)
    np.testing.assert_array_equal(names[moved.indices], take(routing.indices, order))
    np.testing.assert_allclose(moved.load, take(routing.load, names), rtol=1e-6)
    for name, loss in routing.losses().items():
        assert_close(moved.losses()[name], loss, dtype="float32", length=28)


def test_one_expert_is_a_gated_unit():
    layer = make(num_experts=1, top_k=1, d_ff=5, use_bias=True)
    assert layer.gate_bias is not None
    swiglu = filled(SwiGLU, 3, 5, True, seed=1, size=0.4)
    maps = [swiglu.gate_proj, swiglu.up_proj, swiglu.down_proj]
    own = {}
    for name, part in zip(("gate", "up", "down"), maps, strict=True):
        own |= {name: take(part.weight, None), f"{name}_bias": take(part.bias, None)}
    layer = eqx.tree_at(lambda m: [getattr(m, n) for n in own], layer, [*own.values()])
    x = random((2, 4, 3))
    want = eqx.filter_jit(swiglu)(x)
    assert_close(compiled()(layer, x)[0], want, dtype="float32", length=10)


@settings(max_examples=50)
@given(seed=seeds)
def test_a_capacity_for_all_drops_nothing_and_less_drops_what_is_over(seed):
    x = random((8, 3), seed)
    plain, routing = compiled()(make(seed), x)
    roomy, found = compiled()(make(seed, capacity_factor=4.0), x)
    assert_close(roomy, plain, dtype="float32", length=12)
    assert found.dropped == 0
    _, found = compiled()(make(seed, capacity_factor=0.5), x)
    places = math.ceil(0.5 * 2 * 8 / 4)
    counts = np.bincount(np.asarray(routing.indices).ravel(), minlength=4)
    assert found.dropped == np.sum(np.maximum(counts - places, 0))


MASK = np.asarray([[True, False, True], [False, True, True]])


@pytest.mark.parametrize("factor", [None, 0.75])
def test_a_masked_token_is_as_if_absent(factor):
    options = {"use_bias": True, "shared_d_ff": 2}
    layer = make(**options, capacity_factor=factor)
    x = np.array(random((2, 3, 3)))
    x[~MASK] = np.nan
    x = jnp.asarray(x)
    y, routing = compiled()(layer, x, jnp.asarray(MASK))
    np.testing.assert_array_equal(take(y, ~MASK), np.zeros((2, 3)))
    np.testing.assert_array_equal(take(routing.indices, ~MASK), np.full((2, 2), -1))
    np.testing.assert_array_equal(take(routing.weights, ~MASK), np.zeros((2, 2)))
    # The places are counted for all six tokens: ceil(0.75 * 2 * 6 / 4) = 3.
    alone = make(**options, capacity_factor=None if factor is None else 1.5)
    want, without = compiled()(alone, take(x, MASK))
    assert_close(take(y, MASK), want, dtype="float32", length=12)
    np.testing.assert_array_equal(take(routing.indices, MASK), without.indices)
    np.testing.assert_allclose(routing.load, without.load, rtol=1e-6)
    for name, loss in without.losses().items():
        assert_close(routing.losses()[name], loss, dtype="float32", length=12)
    assert routing.dropped == without.dropped


def test_nothing_but_padding_is_finite_with_finite_gradients():
    layer = make(use_bias=True, shared_d_ff=2, score="sigmoid")
    mask, x = jnp.zeros((4,), bool), jnp.full((4, 3), jnp.nan)

    def loss(both):
        y, routing = both[0](both[1], mask=mask)
        return jnp.sum(y) + sum(routing.losses().values()), routing

    function = eqx.filter_value_and_grad(loss, has_aux=True)
    (value, routing), gradient = eqx.filter_jit(function)((layer, x))
    assert value == 0
    np.testing.assert_array_equal(routing.load, np.zeros(4))
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))


def test_the_router_sends_tokens_to_different_experts():
    """With equal scores every token would take the first experts of all."""
    layer = built(MoE, 64, 8, 2, 4, key=KEY)
    _, routing = compiled()(layer, random((500, 64)))
    assert np.std(layer.router.weight) == pytest.approx(0.02, rel=0.1)
    assert np.min(routing.load) > 0.25 / 8
    assert np.max(routing.load) < 3 / 8
    assert float(routing.balance_loss) < 1.1


def test_initial_values_of_the_experts():
    layer = built(
        MoE,
        *(9, 3, 1, 25),
        use_bias=True,
        shared_d_ff=4,
        score="sigmoid",
        use_selection_bias=True,
        dtype="bfloat16",
        key=KEY,
    )
    np.testing.assert_array_equal(layer.selection_bias, np.zeros(3))
    layer = eqx.tree_at(lambda m: m.selection_bias, layer, None)
    for name, limit in (("gate", 3), ("up", 3), ("down", 5)):
        for leaf in (getattr(layer, name), getattr(layer, f"{name}_bias")):
            values = np.abs(wide(leaf.astype("float32")))
            # bfloat16 rounds the largest ones up to the limit.
            assert 0.8 / limit < np.max(values) <= 1.01 / limit
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layer)} == {"bfloat16"}
    assert not np.array_equal(layer.gate, layer.up)


def test_the_balance_loss_can_be_less_than_one():
    # The expert that most tokens choose has the smaller mean score.
    scores = np.asarray([[0.51, 0.49], [0.51, 0.49], [0.1, 0.9]])
    layer = make(d_model=2, num_experts=2, top_k=1)
    layer = eqx.tree_at(
        lambda m: m.router.weight, layer, jnp.asarray(np.eye(2), "float32")
    )
    _, routing = compiled()(layer, jnp.asarray(np.log(scores), "float32"))
    want = 2 * (2 / 3 * 1.12 / 3 + 1 / 3 * 1.88 / 3)
    assert want < 1
    assert_close(routing.balance_loss, want, dtype="float32", length=4)


@settings(max_examples=50)
@given(seed=seeds)
def test_a_selection_bias_changes_the_choice_and_not_the_weights(seed):
    plain = make(seed, score="sigmoid")
    layer = make(seed, score="sigmoid", use_selection_bias=True)
    x, bias = random((6, 3), seed), random((4,), seed + 1)
    unbiased, _ = compiled()(layer, x)
    assert_close(unbiased, compiled()(plain, x)[0], dtype="float32", length=12)
    layer = eqx.tree_at(lambda m: m.selection_bias, layer, bias)
    y, routing = compiled()(layer, x)
    want, indices, weights, _ = expected(layer, x, wide(bias))
    np.testing.assert_array_equal(routing.indices, indices)
    assert_close(routing.weights, weights, dtype="float32", length=4)
    assert_close(y, want, dtype="float32", length=12)


def test_the_selection_bias_has_no_gradient_and_balances():
    layer = make(use_selection_bias=True, top_k=1, num_experts=3)
    # Every token likes expert 0 best.
    weight = jnp.asarray([[1.0, 1, 1], [0.5, -0.5, 0], [0, 0.5, -0.5]])
    layer = eqx.tree_at(lambda m: m.router.weight, layer, weight)
    x = jnp.asarray(np.abs(random((60, 3))))

    @eqx.filter_jit
    def step(layer):
        def loss(layer):
            y, routing = layer(x)
            return jnp.sum(y**2) + sum(routing.losses().values()), routing

        gradient, routing = eqx.filter_grad(loss, has_aux=True)(layer)
        bias = update_selection_bias(layer.selection_bias, routing.load, 0.01)
        moved = eqx.tree_at(lambda m: m.selection_bias, layer, bias)
        return moved, routing.load, gradient.selection_bias

    _, load, gradient = step(layer)
    np.testing.assert_array_equal(load, [1, 0, 0])
    np.testing.assert_array_equal(gradient, np.zeros(3))
    for _ in range(80):
        layer, load, _ = step(layer)
    assert np.max(load) < 0.45


@pytest.mark.parametrize(
    ("check", "options"),
    [
        (check_first_order, {"use_bias": True, "shared_d_ff": 2}),
        # Those of the biases and of a gated unit are known from their own tests.
        pytest.param(check_second_order, {}, marks=pytest.mark.slow),
    ],
)
def test_derivatives_of_output_and_losses(check, options):
    layer = make(score="sigmoid", num_experts=3, **options)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    point = {f"p{i}": wide(leaf) for i, leaf in enumerate(leaves)}
    point["x"] = wide(random((4, 3)))

    def build(point):
        leaves = [point[f"p{i}"] for i in range(len(point) - 1)]
        return eqx.combine(jax.tree.unflatten(structure, leaves), static)

    def function(point):
        y, routing = build(point)(point["x"])
        return jnp.sum(jnp.sin(y)) + routing.balance_loss + 0.1 * routing.z_loss

    def oracle(point):
        layer = build(point)
        y, indices, _, logits = expected(layer, point["x"])
        _, balance, z = expert_oracle.losses(logits, indices, layer.score)
        return float(np.sum(np.sin(y)) + balance + 0.1 * z)

    check(function, oracle, point)


def test_vmap_gives_every_row_its_own_routing():
    layer, x = make(), random((3, 5, 3))
    y, routing = jax.jit(jax.vmap(layer))(x)
    for index in range(3):
        want, own = compiled()(layer, take(x, index))
        assert_close(take(y, index), want, dtype="float32", length=12)
        np.testing.assert_allclose(take(routing.load, index), own.load, rtol=1e-6)
    together, _ = compiled()(layer, x)
    assert_close(together, y, dtype="float32", length=12)


def test_biases_do_not_decay():
    layer = make(use_bias=True, use_selection_bias=True, shared_d_ff=2)
    mask = weight_decay_mask(layer)
    assert mask.router.weight
    assert mask.shared.up_proj.weight
    assert not mask.shared.up_proj.bias
    assert not mask.selection_bias
    for name in STACKED:
        assert getattr(mask, name) == (not name.endswith("_bias"))
