"""RigL, SET and pruning against loops in float64, step by step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.precision import enable_x64
from support.sparsity_oracle import (
    Rigl,
    cosine_share,
    moved,
    nm_mask,
    pruned_count,
    share_mask,
)

from capibara_eqx.transforms import (
    NM,
    Rule,
    Unstructured,
    magnitude_pruning,
    rigl,
    set_training,
)
from capibara_eqx.transforms._places import places
from capibara_eqx.transforms._rigl import cosine_fraction, exchange
from capibara_eqx.transforms._unstructured import Groups


seeds = st.integers(0, 2**16)
SHAPE = (4, 12)
SIZE = 48
SPECS = {"share": Unstructured(0.35), "2:4": NM(2, 4), "1:3": NM(1, 3)}
KEPT = {"share": 17, "2:4": 24, "1:3": 16}
each = st.sampled_from(list(SPECS))
ADAM = {"rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
RIGL: dict[str, Any] = {"alpha": 0.8, "delta_t": 3, "t_end": 10} | ADAM
STEPS = 13


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def width(name):
    return SIZE if name == "share" else SPECS[name].m


def first_mask(name, scores):
    """By a matrix of scores, as `sparsify` chooses."""
    if name == "share":
        return share_mask(scores, KEPT[name])
    return nm_mask(scores, SPECS[name].n, SPECS[name].m)


def per_group(masks, name):
    """True values of every group, `(..., groups)`."""
    shape = (*masks.shape[:-2], -1, width(name))
    return np.asarray(masks).reshape(shape).sum(axis=-1)


@functools.cache
def exchanged(name):
    (place,) = places({"w": jnp.zeros((2, *SHAPE))})
    groups = Groups.of("test", place, SPECS[name])
    return jax.jit(functools.partial(exchange, groups=groups))


@settings(max_examples=100)
@given(name=each, leave=st.integers(0, 16), coarse=st.booleans(), seed=seeds)
def test_places_that_change(name, leave, coarse, seed):
    weight, growth, scores = random((3, 2, *SHAPE), seed).astype("float32")
    if coarse:  # many ties
        weight, growth = np.round(weight), np.round(growth)
    mask = np.stack([first_mask(name, np.abs(s)) for s in scores])
    weight = np.where(mask, weight, 0)
    share = (leave + 0.5) / KEPT[name]
    got, new = exchanged(name)(mask, weight, growth=np.abs(growth), fraction=share)
    got, new = np.asarray(got), np.asarray(new)
    for i in range(2):
        want, stay, grown = moved(mask[i], weight[i], growth[i], share, width(name))
        np.testing.assert_array_equal(got[i], want)
        np.testing.assert_array_equal(new[i], grown & ~mask[i])
        assert stay.sum() == KEPT[name] - leave
        assert not (stay & new[i]).any()
    np.testing.assert_array_equal(per_group(got, name), per_group(mask, name))


@functools.cache
def trajectory(name, kind="rigl"):
    """All that an optimiser has after each of several updates, compiled once."""
    rules = [Rule("w", SPECS[name])]
    adam = optax.adam(RIGL["rate"], RIGL["b1"], RIGL["b2"], RIGL["eps"])
    times = {"alpha": RIGL["alpha"], "delta_t": RIGL["delta_t"]}

    def run(params, gradients, key):
        if kind == "rigl":
            optimizer = rigl(adam, rules, **times, t_end=RIGL["t_end"])
        elif kind == "set":
            optimizer = set_training(adam, rules, **times, t_end=RIGL["t_end"], key=key)
        else:
            optimizer = magnitude_pruning(adam, rules, 3, begin=2, end=10)

        def step(carry, gradient):
            params, state = carry
            # optax divides numbers by counts of steps.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            now: Any = state
            moments = now.inner[0]
            seen = params, now.masks["w"], moments.mu["w"], moments.nu["w"]
            return (params, state), seen

        state: Any = optimizer.init(params)
        _, seen = jax.lax.scan(step, (params, state), gradients)
        return state.masks["w"], *seen

    return jax.jit(run)


def followed(name, seed, kind="rigl"):
    """Gradients, the first weights, and the trajectory under them, in float64."""
    params = {"w": random(SHAPE, seed), "b": random((3,), seed)}
    gradients = {
        "w": random((STEPS, *SHAPE), seed + 1),
        "b": random((STEPS, 3), seed + 2),
    }
    with enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, (params, gradients))
        out = trajectory(name, kind)(*arrays, jax.random.key(seed))
        return gradients, params, jax.tree.map(np.asarray, out)


@settings(max_examples=60)
@given(name=each, seed=seeds)
def test_rigl_is_its_loop(name, seed):
    gradients, start, (first, params, masks, mu, nu) = followed(name, seed)
    np.testing.assert_array_equal(first, first_mask(name, np.abs(start["w"])))
    loop = Rigl(start["w"], first, width(name), RIGL)
    before, weights = first, start["w"]
    for t in range(STEPS):
        loop.update(gradients["w"][t])
        np.testing.assert_array_equal(masks[t], loop.mask)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
        close(params["w"][t], loop.weight)
        close(mu[t], loop.mu)
        close(nu[t], loop.nu)
        # What always holds.
        assert (params["w"][t][~masks[t]] == 0).all()
        np.testing.assert_array_equal(per_group(masks[t], name), per_group(first, name))
        new = masks[t] & ~before
        for values in (params["w"], mu, nu):
            assert (values[t][new] == 0).all()
        moves = (t + 1) % RIGL["delta_t"] == 0 and t + 1 < RIGL["t_end"]
        if moves:
            # Only places change: what was there and is new to none stays, bit by bit.
            kept = masks[t] & before
            np.testing.assert_array_equal(params["w"][t][kept], weights[kept])
            if t > 0:
                np.testing.assert_array_equal(mu[t][~new], mu[t - 1][~new])
                np.testing.assert_array_equal(params["b"][t], params["b"][t - 1])
        else:
            assert not new.any()
        before, weights = masks[t], params["w"][t]


def test_shares_of_the_loop_are_no_near_ties():
    """Else rounding could decide how many leave."""
    for kept in KEPT.values():
        for t in range(0, RIGL["t_end"], RIGL["delta_t"]):
            count = cosine_share(t, RIGL["alpha"], RIGL["t_end"]) * kept
            assert abs(count - round(count)) > 1e-3


@settings(max_examples=50)
@given(alpha=st.floats(0.01, 1), t_end=st.integers(1, 10**6), share=st.floats(0, 1))
def test_the_share_that_moves_falls_to_zero(alpha, t_end, share):
    step = int(share * t_end)
    found = float(cosine_fraction(jnp.asarray(step), alpha, t_end))
    # A rounding of pi t / T and one of the cosine.
    assert abs(found - cosine_share(step, alpha, t_end)) < 1e-6
    assert float(cosine_fraction(jnp.asarray(t_end), alpha, t_end)) == 0
    assert float(cosine_fraction(jnp.asarray(0), alpha, t_end)) == np.float32(alpha)


@settings(max_examples=50)
@given(name=each, seed=seeds)
def test_set_moves_the_smallest_anywhere(name, seed):
    _, start, (first, params, masks, mu, _) = followed(name, seed, "set")
    before, weights = first, np.where(first, start["w"], 0)
    leaving = int(RIGL["alpha"] * KEPT[name])
    for t in range(STEPS):
        assert (params["w"][t][~masks[t]] == 0).all()
        np.testing.assert_array_equal(per_group(masks[t], name), per_group(first, name))
        new = masks[t] & ~before
        assert (params["w"][t][new] == 0).all()
        assert (mu[t][new] == 0).all()
        if (t + 1) % RIGL["delta_t"] == 0 and t + 1 < RIGL["t_end"]:
            stay = share_mask(
                np.where(before, np.abs(weights), -1), KEPT[name] - leaving
            )
            assert (masks[t] | ~stay).all()
        else:
            np.testing.assert_array_equal(masks[t], before)
        before, weights = masks[t], params["w"][t]


@pytest.mark.slow
def test_set_draws_every_free_place_alike():
    """Over keys; the same key draws the same."""
    rules = [Rule("w", Unstructured(0.25))]
    params = {"w": jnp.asarray(random((4, 8)), "float32")}

    def grown(key):
        optimizer = set_training(optax.sgd(0.1), rules, 0.5, 1, t_end=2, key=key)
        state: Any = optimizer.init(params)
        _, state = optimizer.update(params, state, params)
        return state.masks["w"]

    keys = jax.random.split(jax.random.key(0), 800)
    masks = np.asarray(jax.jit(jax.vmap(grown))(keys))
    size = np.abs(np.asarray(params["w"]))
    stay = share_mask(size, 4)
    assert masks[:, stay].all()
    counts = masks[:, ~stay].sum(axis=0)
    # 4 of the 28 others, a fair draw: five deviations of a binomial count.
    assert np.abs(counts - 800 / 7).max() < 5 * np.sqrt(800 / 7 * 6 / 7)
    again = np.asarray(jax.jit(jax.vmap(grown))(keys))
    np.testing.assert_array_equal(again, masks)


@settings(max_examples=50)
@given(name=each, seed=seeds)
def test_pruning_is_its_loop(name, seed):
    gradients, start, (first, params, masks, *_) = followed(name, seed, "prune")
    assert first.all()
    group = width(name)
    left = KEPT[name] * group // SIZE  # of a group
    loop = Rigl(start["w"], first, group, RIGL | {"delta_t": STEPS + 1})
    for t in range(1, STEPS + 1):
        if t in (2, 5, 8, 10):
            count = pruned_count(t, 2, 10, group, left)
            size = np.where(loop.mask, np.abs(loop.weight), -1).reshape(1, -1, group)
            found = [share_mask(row[None, None], count) for row in size[0]]
            loop.mask = np.reshape(found, SHAPE) & loop.mask
            loop.weight = np.where(loop.mask, loop.weight, 0)
            assert loop.mask.sum() == count * SIZE // group
        loop.update(gradients["w"][t - 1])
        np.testing.assert_array_equal(masks[t - 1], loop.mask)
        np.testing.assert_allclose(
            params["w"][t - 1], loop.weight, rtol=1e-9, atol=1e-12
        )
    assert masks[-1].sum() == KEPT[name]


def test_counts_of_zhu_and_gupta():
    """The schedule of the paper, from none to 90 % zeros."""
    steps = [(t, pruned_count(t, 0, 100, 1000, 100)) for t in (0, 10, 50, 100)]
    sparsity = [0.9 * (1 - (1 - t / 100) ** 3) for t, _ in steps]
    np.testing.assert_allclose([1 - c / 1000 for _, c in steps], sparsity, atol=5e-4)


@pytest.mark.parametrize("name", SPECS)
def test_nothing_moves_when_all_are_kept(name):
    """Density one is the optimiser inside, but for the steps that would move."""
    spec = NM(4, 4) if name != "share" else Unstructured(1.0)
    optimizer = rigl(optax.sgd(0.5), [Rule("w", spec)], delta_t=2, t_end=9)
    params = {"w": jnp.asarray(random(SHAPE), "float32")}
    state: Any = optimizer.init(params)
    assert state.masks["w"].all()
    update = jax.jit(optimizer.update)
    for t in range(1, 4):
        updates, state = update(params, state, params)
        want = 0 * params["w"] if t == 2 else -0.5 * params["w"]
        np.testing.assert_array_equal(updates["w"], want)
