"""Episodes: the right number of each class, nothing twice, every choice as likely."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from capibara_eqx.meta.tasks import (
    ClassPool,
    sample_episodes,
    split_classes,
    split_examples,
)
from capibara_eqx.meta.tasks._draw import draw


SEEDS = st.integers(0, 2**32 - 1)
CHANCE = 1e-9
# Classes of unequal size under numbers with gaps, in no order. An example is its own
# place, so that it is seen where it came from.
LABELS = np.random.default_rng(0).permutation(np.repeat([7, -2, 30, 4], [6, 9, 5, 7]))
PLACES = np.arange(len(LABELS))


def pool_of_places() -> ClassPool:
    return ClassPool.init(np.stack([PLACES, -PLACES], axis=1), LABELS)


# One program of each: a test looks at as many of the tasks as it needs.
episodes = eqx.filter_jit(
    partial(sample_episodes, num_tasks=500, ways=3, shots=2, queries=3)
)
three = jax.jit(jax.vmap(partial(draw, num=3), in_axes=(0, None)))


def triples(seed: int, below: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), 12_000)
    return np.asarray(three(keys, jnp.int32(below)))


def test_a_pool_holds_each_class_together():
    pool = pool_of_places()
    assert pool.num_classes == 4
    assert pool.smallest == 5
    np.testing.assert_array_equal(pool.counts, [9, 7, 6, 5])
    np.testing.assert_array_equal(pool.starts, [0, 9, 16, 22])
    for label, start, count in zip(
        [-2, 4, 7, 30], pool.starts, pool.counts, strict=True
    ):
        rows = np.asarray(pool.x[int(start) : int(start + count)])
        np.testing.assert_array_equal(rows[:, 0], PLACES[label == LABELS])
        np.testing.assert_array_equal(rows[:, 1], -rows[:, 0])


@given(seed=SEEDS)
@settings(max_examples=50)
def test_an_episode_is_one(seed):
    task = episodes(jax.random.key(seed), pool=pool_of_places())
    for index in range(3):
        (x, y), (x_query, y_query) = (
            tuple(np.asarray(part)[index] for part in parts)
            for parts in (task.support, task.query)
        )
        np.testing.assert_array_equal(y, np.repeat([0, 1, 2], 2))
        np.testing.assert_array_equal(y_query, np.repeat([0, 1, 2], 3))
        places = np.concatenate([x, x_query])[:, 0]
        assert len(set(places)) == 15
        np.testing.assert_array_equal(np.concatenate([x, x_query])[:, 1], -places)
        # Each name stands for one class, the same on both sides, and no two for one.
        classes = {}
        for place, name in zip(places, np.concatenate([y, y_query]), strict=True):
            assert classes.setdefault(name, LABELS[place]) == LABELS[place]
        assert len(set(classes.values())) == 3


@given(seed=SEEDS, below=st.integers(3, 40))
@settings(max_examples=50)
def test_numbers_that_are_drawn_differ(seed, below):
    numbers = np.sort(triples(seed, below), axis=1)
    assert (np.diff(numbers, axis=1) > 0).all()
    assert numbers.min() >= 0
    assert numbers.max() < below


def is_uniform(outcomes, possible):
    """Whether outcomes are as often as chance allows, by Pearson's statistic."""
    index = {outcome: place for place, outcome in enumerate(possible)}
    counts = np.bincount([index[o] for o in outcomes], minlength=len(index))
    return stats.chisquare(counts).pvalue > CHANCE


@pytest.mark.parametrize("below", [3, 5])
def test_every_order_is_as_likely(getkey, below):
    seed = int(jax.random.bits(getkey()))
    outcomes = [tuple(row) for row in triples(seed, below).tolist()]
    assert is_uniform(outcomes, list(itertools.permutations(range(below), 3)))


def test_names_and_examples_of_an_episode_are_drawn_evenly(getkey):
    task = episodes(getkey(), pool=pool_of_places())
    # The first example of each name, to learn from and to be judged by.
    support = np.asarray(task.support[0])[:, ::2, 0]
    names = [tuple(row) for row in LABELS[support].tolist()]
    assert is_uniform(names, list(itertools.permutations([-2, 4, 7, 30], 3)))
    query = np.asarray(task.query[0])[:, ::3, 0]
    of_seven = np.flatnonzero(LABELS == 7).tolist()
    pairs = np.stack([support, query], axis=-1).reshape(-1, 2)
    pairs = [tuple(pair) for pair in pairs[LABELS[pairs[:, 0]] == 7].tolist()]
    assert is_uniform(pairs, list(itertools.permutations(of_seven, 2)))


@pytest.mark.slow
def test_a_key_gives_the_same_episodes_inside_of_jit(getkey):
    key, pool = getkey(), pool_of_places()
    how = {"num_tasks": 500, "ways": 3, "shots": 2, "queries": 3}
    eager = sample_episodes(key, pool=pool, **how)
    inside = episodes(key, pool=pool)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(inside), strict=True):
        np.testing.assert_array_equal(a, b)
    other = episodes(getkey(), pool=pool)
    assert (np.asarray(other.query[0]) != np.asarray(inside.query[0])).any()


def places(pool: ClassPool) -> list[int]:
    return np.asarray(pool.x)[:, 0].tolist()


@given(seed=SEEDS, train=st.integers(1, 4))
def test_held_out_examples_are_of_all_classes(seed, train):
    parts = split_examples(jax.random.key(seed), pool_of_places(), train)
    assert sorted(places(parts[0]) + places(parts[1])) == PLACES.tolist()
    np.testing.assert_array_equal(parts[0].counts, [train] * 4)
    np.testing.assert_array_equal(parts[1].counts, np.array([9, 7, 6, 5]) - train)
    assert (parts[0].smallest, parts[1].smallest) == (train, 5 - train)
    for part in parts:
        found = np.split(np.array(places(part)), np.asarray(part.starts)[1:])
        assert [set(LABELS[of]) for of in found] == [{-2}, {4}, {7}, {30}]


@given(seed=SEEDS, train=st.integers(1, 3))
def test_held_out_classes_are_whole(seed, train):
    parts = split_classes(jax.random.key(seed), pool_of_places(), train)
    assert sorted(places(parts[0]) + places(parts[1])) == PLACES.tolist()
    assert [part.num_classes for part in parts] == [train, 4 - train]
    labels = [set(LABELS[places(part)]) for part in parts]
    assert not labels[0] & labels[1]
    for part in parts:
        found = np.split(np.array(places(part)), np.asarray(part.starts)[1:])
        assert all(len(set(LABELS[of])) == 1 for of in found)
        assert [len(of) for of in found] == np.asarray(part.counts).tolist()
        assert part.smallest == min(len(of) for of in found)


def test_what_is_held_out_follows_from_the_key(getkey):
    key, other, pool = getkey(), getkey(), pool_of_places()
    first = places(split_examples(key, pool, 3)[0])
    assert first == places(split_examples(key, pool, 3)[0])
    assert first != places(split_examples(other, pool, 3)[0])
    # All six choices of two of four classes come up, and as often.
    chosen = [
        tuple(sorted(set(LABELS[places(split_classes(key, pool, 2)[0])].tolist())))
        for key in jax.random.split(key, 120)
    ]
    assert is_uniform(chosen, list(itertools.combinations([-2, 4, 7, 30], 2)))
