"""Mixtures of rookies against loops over all experts, and what holds for any values."""

import functools
import operator
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
from support import expert_oracle
from support.derivatives import check_first_order, check_second_order
from support.quick import built, filled
from support.rookie_oracle import product_scores, rookies
from support.tolerances import assert_close

from capibara_eqx.layers import MixtureOfRookies, weight_decay_mask


KEY = jax.random.key(0)
seeds = st.integers(0, 2**32 - 1)
KEYS: dict[str, Any] = {"routing": "product_key", "num_rookies": 9, "rookie_size": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"num_rookies": 5},
    "relu": {"num_rookies": 5, "activation": "relu", "top_k": 3},
    "product_key": KEYS,
    "heads": KEYS | {"n_heads": 2, "d_key": 2, "top_k": 4, "query_norm": True},
    "larger": KEYS | {"rookie_size": 3, "n_heads": 2, "activation": "silu"},
}
each = pytest.mark.parametrize("name", OPTIONS)


def random(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


def make(seed=0, **options):
    """A layer whose scores differ enough to tell its experts apart."""
    sizes: dict[str, Any] = {"d_model": 3, "rookie_size": 2, "top_k": 2}
    return filled(MixtureOfRookies, seed=seed, size=0.7, **(sizes | options))


@functools.cache
def compiled():
    return eqx.filter_jit(lambda layer, x, mask=None: layer(x, mask=mask))


def close(got, want, length=12):
    assert_close(got, want, dtype="float32", length=length)


def same_routing(got, want):
    y, indices, weights, (load, balance, z) = want
    np.testing.assert_array_equal(got.indices, indices)
    close(got.weights, weights)
    close(got.load, load)
    close(got.balance_loss, balance)
    close(got.z_loss, z)


@given(name=st.sampled_from([*OPTIONS]), seed=seeds)
@settings(max_examples=60)
def test_values_and_losses(name, seed):
    layer, x = make(seed, **OPTIONS[name]), random((7, 3), seed)
    y, routing = compiled()(layer, x)
    want = rookies(layer, x)
    close(y, want[0])
    same_routing(routing, want)
    assert set(routing.losses()) == {"balance", "router_z"}
    choices = layer.n_heads * layer.top_k
    np.testing.assert_array_equal(routing.active_count, np.full(7, choices))
    counts = np.bincount(np.ravel(routing.indices), minlength=layer.num_rookies)
    close(7 * choices * wide(routing.load), counts)
    assert np.sum(counts) == 7 * choices
    assert routing.dropped == 0


@given(
    name=st.sampled_from(["softmax", "heads"]),
    implementation=st.sampled_from(["ragged", "gather", "scan", "dense", "reference"]),
    seed=seeds,
)
@settings(max_examples=50)
def test_every_implementation_is_the_loop(name, implementation, seed):
    layer = make(seed, **OPTIONS[name], implementation=implementation)
    x = random((7, 3), seed)
    close(compiled()(layer, x)[0], rookies(layer, x)[0])


@given(name=st.sampled_from(["softmax", "product_key"]), seed=seeds)
@settings(max_examples=50)
def test_all_rookies_are_the_dense_mixture(name, seed):
    options = OPTIONS[name]
    layer = make(seed, **(options | {"top_k": options["num_rookies"]}))
    x = random((5, 3), seed)
    y, routing = compiled()(layer, x)
    if name == "softmax":
        scores = wide(x) @ wide(layer.router.weight).T
    else:
        scores = product_scores(layer, wide(x))[:, 0]
    hidden = np.einsum("td,efd->tef", wide(x), wide(layer.up))
    hidden = expert_oracle.ACTIVATIONS["gelu"](hidden)
    mixing = expert_oracle.softmax(scores)
    close(y, np.einsum("te,tef,edf->td", mixing, hidden, wide(layer.down)), length=20)
    close(routing.load, np.full(layer.num_rookies, 1 / layer.num_rookies))
    close(routing.balance_loss, 1.0)


@given(seed=seeds, name=st.sampled_from(["softmax", "heads"]))
@settings(max_examples=50)
def test_the_names_of_rookies_and_the_order_of_tokens_do_not_matter(seed, name):
    layer, x = make(seed, **OPTIONS[name]), random((7, 3), seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(7)
    if name == "softmax":
        names = rng.permutation(5)
        where, router = operator.attrgetter("router.weight"), layer.router.weight[names]
    else:
        # Other keys of either half are other pairs.
        first, second = rng.permutation(3), rng.permutation(3)
        names = (3 * first[:, None] + second).ravel()
        where, keys = operator.attrgetter("router.keys"), np.asarray(layer.router.keys)
        router = jnp.stack([keys[:, 0, first], keys[:, 1, second]], axis=1)
    renamed = eqx.tree_at(
        lambda m: [where(m), m.up, m.down],
        layer,
        [jnp.asarray(router), layer.up[names], layer.down[names]],
    )
    y, routing = compiled()(layer, x)
    got, moved = compiled()(renamed, x[order])
    close(got, np.asarray(y)[order])
    np.testing.assert_array_equal(names[moved.indices], routing.indices[order])
    np.testing.assert_allclose(moved.load, np.asarray(routing.load)[names], rtol=1e-6)
    for loss, value in routing.losses().items():
        close(moved.losses()[loss], value, length=28)


@functools.cache
def router_of(root, top_k):
    """Two heads of product keys, and a function that all examples of a shape share."""
    keys: dict[str, Any] = {"routing": "product_key", "n_heads": 2}
    router = make(num_rookies=root**2, top_k=top_k, **keys).router

    def both(router, x):
        return router(x, top_k, None), router._scores(x)

    return router, eqx.filter_jit(both)


# Fewer than a half has keys, as many, more, and all pairs.
@pytest.mark.parametrize(
    ("root", "top_k"), [(1, 1), (2, 1), (2, 3), (3, 3), (3, 9), (7, 4), (7, 11)]
)
@given(seed=seeds)
@settings(max_examples=50)
def test_the_best_pairs_are_the_best_of_all_experts(root, top_k, seed):
    router, function = router_of(root, top_k)
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal(router.keys.shape)
    router = eqx.tree_at(lambda r: r.keys, router, jnp.asarray(keys, "float32"))
    routing, scores = function(router, random((4, 3), seed))
    scores = np.asarray(scores)
    every = (scores[..., 0, :, None] + scores[..., 1, None, :]).reshape(4, 2, -1)
    best = np.argsort(-every, axis=-1, kind="stable")[..., :top_k]
    got = np.asarray(routing.indices).reshape(4, 2, top_k)
    # Equal sums may come in another order.
    np.testing.assert_array_equal(
        np.take_along_axis(every, got, axis=-1), np.take_along_axis(every, best, -1)
    )
    assert all(len(set(row)) == top_k for row in got.reshape(-1, top_k))
    weights = expert_oracle.softmax(np.take_along_axis(wide(every), best, axis=-1))
    close(routing.weights, weights.reshape(4, -1))


def test_one_rookie_is_a_feed_forward_layer():
    layer, x = make(num_rookies=1, rookie_size=5, top_k=1), random((2, 4, 3))
    y, routing = compiled()(layer, x)
    hidden = expert_oracle.ACTIVATIONS["gelu"](wide(x) @ wide(layer.up[0]).T)
    close(y, hidden @ wide(layer.down[0]).T)
    assert routing.active_count.shape == (2, 4)


def test_parameters_are_those_that_are_documented():
    def shapes(**options):
        make = functools.partial(MixtureOfRookies, 768, **options)
        return eqx.filter_eval_shape(make, key=KEY)

    layer = shapes()
    assert layer.up.size + layer.down.size == 32 * 2 * 64 * 768
    assert layer.router.weight.size == 32 * 768
    peer = shapes(routing="product_key", num_rookies=1024**2, rookie_size=1, n_heads=8)
    assert peer.up.size + peer.down.size == 1024**2 * 2 * 768
    assert peer.router.keys.shape == (8, 2, 1024, 384)
    assert peer.router.query.weight.shape == (8 * 768, 768)


def test_initial_values():
    layer = built(MixtureOfRookies, 64, 8, 25, dtype="bfloat16", key=KEY)
    for name, limit in (("up", 8), ("down", 5)):
        values = np.abs(wide(getattr(layer, name).astype("float32")))
        # bfloat16 rounds the largest ones up to the limit.
        assert 0.9 / limit < np.max(values) <= 1.01 / limit
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layer)} == {"bfloat16"}
    layer = built(MixtureOfRookies, 64, 8, 4, key=KEY)
    assert np.std(layer.router.weight) == pytest.approx(0.02, rel=0.1)
    _, routing = compiled()(layer, random((500, 64)))
    assert np.min(routing.load) > 0.25 / 8


def test_initial_product_keys_send_tokens_to_all_rookies():
    keys: dict[str, Any] = {"routing": "product_key", "n_heads": 2, "query_norm": True}
    layer = built(MixtureOfRookies, 64, 64, 1, 3, **keys, key=KEY)
    _, routing = compiled()(layer, random((500, 64)))
    assert np.min(routing.load) > 0.25 / 64
    assert float(routing.balance_loss) < 1.2


MASK = np.asarray([[True, False, True], [False, True, True]])


@each
def test_a_masked_token_is_as_if_absent(name):
    layer = make(**OPTIONS[name])
    x = np.array(random((2, 3, 3)))
    x[~MASK] = np.nan
    y, routing = compiled()(layer, jnp.asarray(x), jnp.asarray(MASK))
    np.testing.assert_array_equal(np.asarray(y)[~MASK], np.zeros((2, 3)))
    np.testing.assert_array_equal(np.asarray(routing.indices)[~MASK], -1)
    np.testing.assert_array_equal(np.asarray(routing.weights)[~MASK], 0)
    choices = layer.top_k * layer.n_heads
    np.testing.assert_array_equal(routing.active_count, MASK * choices)
    want = rookies(layer, x[MASK])
    close(np.asarray(y)[MASK], want[0])
    kept = eqx.tree_at(
        lambda r: (r.indices, r.weights),
        routing,
        (np.asarray(routing.indices)[MASK], np.asarray(routing.weights)[MASK]),
    )
    same_routing(kept, want)


@pytest.mark.parametrize("name", ["softmax", "heads"])
def test_nothing_but_padding_is_finite_with_finite_gradients(name):
    layer = make(**OPTIONS[name])
    mask, x = jnp.zeros((4,), bool), jnp.full((4, 3), jnp.nan)

    def loss(both):
        y, routing = both[0](both[1], mask=mask)
        return jnp.sum(y) + sum(routing.losses().values()), routing

    function = eqx.filter_value_and_grad(loss, has_aux=True)
    (value, routing), gradient = eqx.filter_jit(function)((layer, x))
    assert value == 0
    np.testing.assert_array_equal(routing.load, np.zeros(layer.num_rookies))
    np.testing.assert_array_equal(routing.active_count, np.zeros(4))
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (check_first_order, "heads"),
        (check_second_order, "heads"),
        # Routed as in MoE, through experts whose derivatives have tests of their own.
        pytest.param(check_first_order, "softmax", marks=pytest.mark.slow),
        pytest.param(check_second_order, "softmax", marks=pytest.mark.slow),
    ],
)
def test_derivatives_of_output_and_losses(check, name):
    layer = make(**(OPTIONS[name] | {"rookie_size": 2, "top_k": 2}))
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
        y, _, _, (_, balance, z) = rookies(build(point), point["x"])
        return float(np.sum(np.sin(y)) + balance + 0.1 * z)

    check(function, oracle, point)


@pytest.mark.parametrize("name", ["softmax", "heads"])
@pytest.mark.slow
def test_vmap_gives_every_row_its_own_routing(name):
    layer, x = make(**OPTIONS[name]), random((3, 5, 3))
    y, routing = jax.jit(jax.vmap(layer))(x)
    for index in range(3):
        want, own = compiled()(layer, x[index])
        close(np.asarray(y)[index], want)
        np.testing.assert_allclose(routing.load[index], own.load, rtol=1e-6)
    close(compiled()(layer, x)[0], y)


def test_bfloat16_tokens_are_routed_as_the_numbers_that_they_are():
    layer, x = make(**OPTIONS["heads"]), random((7, 3), dtype="bfloat16")
    y, routing = compiled()(layer, x)
    assert y.dtype == jnp.bfloat16
    assert routing.weights.dtype == routing.z_loss.dtype == jnp.float32
    want = rookies(layer, x.astype("float32"))
    same_routing(routing, want)
    # Rounded in the weights, between the products, and at the end.
    assert_close(y.astype("float32"), want[0], dtype="bfloat16", length=8, factor=2.0)


def test_norms_do_not_decay():
    mask = weight_decay_mask(make(**OPTIONS["heads"]))
    for decays in (mask.up, mask.down, mask.router.keys, mask.router.query.weight):
        assert decays
    assert not mask.router.norm.weight


@pytest.mark.parametrize(
    "axis_type",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
)
def test_a_shard_of_the_tokens_is_routed_by_itself(axis_type):
    """The mean of losses over devices, and gradients, inside `shard_map`."""
    devices = min(2, len(jax.devices()))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(axis_type,))
    # Not gelu, whose gradient jax 0.12.0 refuses inside `shard_map`.
    layer = make(**OPTIONS["heads"], activation="silu")
    x = random((6, 3))
    parts = jnp.split(x, devices)

    def own(layer, x):
        y, routing = layer(x)
        return y, routing.balance_loss[None], routing.load[None]

    spread = jax.shard_map(
        own, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"),) * 3
    )

    def loss(layer, x):
        y, balance, load = spread(layer, x)
        return jnp.sum(jnp.sin(y)) + jnp.mean(balance), (y, load)

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        gradient, (y, load) = jax.jit(jax.grad(loss, has_aux=True))(layer, placed)
    want = [compiled()(layer, part) for part in parts]
    close(y, np.concatenate([part for part, _ in want]))
    close(load, np.stack([routing.load for _, routing in want]))

    def plain(layer):
        outs = [layer(part) for part in parts]
        balance = sum(routing.balance_loss for _, routing in outs) / devices
        return sum(jnp.sum(jnp.sin(y)) for y, _ in outs) + balance

    pairs = zip(
        jax.tree.leaves(gradient),
        jax.tree.leaves(jax.jit(jax.grad(plain))(layer)),
        strict=True,
    )
    for got, leaf in pairs:
        close(got, leaf, length=40)
