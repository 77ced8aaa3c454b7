"""What samplers, pools and splits refuse, and what they say."""

from typing import Any

import jax
import numpy as np
import pytest
from support.messages import refused

from capibara_eqx.meta.tasks import (
    ClassPool,
    sample_episodes,
    sample_linear_regressions,
    sample_sinusoids,
    split_classes,
    split_examples,
)


pytestmark = pytest.mark.errors

KEY = jax.random.key(0)
SINES = {"num_tasks": 2, "shots": 3, "queries": 4}
MAPS = {"num_tasks": 2, "shots": 3, "queries": 4, "d_in": 2}
EPISODES = {"num_tasks": 2, "shots": 1, "queries": 2, "ways": 2}


@pytest.fixture(scope="module")
def pool():
    """Three classes of 4, 5 and 6."""
    return ClassPool.init(np.zeros((15, 2)), np.repeat([0, 1, 2], [4, 5, 6]))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("name", ["num_tasks", "shots", "queries", "d_in", "ways"])
def test_sizes(name, bad, pool):
    words = (f"`{name}` must be a positive integer", repr(bad))
    if name in SINES:
        with refused(*words):
            sample_sinusoids(KEY, **{**SINES, name: bad})
    if name in MAPS:
        with refused(*words):
            sample_linear_regressions(KEY, **{**MAPS, name: bad})
    if name in EPISODES:
        with refused(*words):
            sample_episodes(KEY, pool=pool, **{**EPISODES, name: bad})


def test_a_pool_is_needed():
    with refused("sample_episodes: `pool`", "ndarray", "ClassPool.init"):
        array: Any = np.zeros((15, 2))
        sample_episodes(KEY, pool=array, **EPISODES)


def test_grid_is_a_flag():
    flag: Any = 1
    with refused("`grid` must be True or False", "1"):
        sample_sinusoids(KEY, **SINES, grid=flag)


def test_more_classes_than_there_are(pool):
    with refused("`ways`", "4 of 3", "split_examples"):
        sample_episodes(KEY, pool=pool, **{**EPISODES, "ways": 4})


def test_more_examples_than_there_are(pool):
    sample_episodes(KEY, pool=pool, **{**EPISODES, "queries": 3})
    with refused("`shots` + `queries`", "2 + 3 of 4", "small classes"):
        sample_episodes(KEY, pool=pool, **{**EPISODES, "shots": 2, "queries": 3})


def test_it_is_said_inside_of_jit_too(pool):
    sample = lambda key, pool: sample_episodes(
        key, pool=pool, **{**EPISODES, "ways": 4}
    )
    with refused("`ways`", "4 of 3"):
        jax.jit(sample)(KEY, pool)


@pytest.mark.parametrize(
    ("x", "labels", "words"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), ("`x`", "at least one", "(0, 2)")),
        (np.zeros(()), np.zeros(0, int), ("`x`", "at least one", "()")),
        (np.zeros((3, 2)), np.zeros(2, int), ("`labels`", "(3,)", "(2,)")),
        (np.zeros((3, 2)), np.zeros((3, 4), int), ("`labels`", "(3, 4)", "argmax")),
        (np.zeros((3, 2)), np.zeros(3), ("`labels`", "integers", "float64")),
        (np.zeros((3, 2)), np.array(["a", "b", "a"]), ("`labels`", "return_inverse")),
        (np.zeros((3, 2)), np.zeros(3, bool), ("`labels`", "integers", "bool")),
    ],
)
def test_examples_and_labels(x, labels, words):
    with refused("ClassPool", *words):
        ClassPool.init(x, labels)


def test_labels_that_are_traced():
    x = np.zeros((3, 2))
    with refused("ClassPool", "`labels`", "traced", "outside of `jit`"):
        jax.jit(lambda labels: ClassPool.init(x, labels))(np.array([0, 1, 0]))


@pytest.mark.parametrize("bad", [0, -1, 1.5])
def test_sizes_of_splits(pool, bad):
    for split in (split_classes, split_examples):
        with refused("`train` must be a positive integer", repr(bad)):
            split(KEY, pool, bad)


def test_a_split_that_leaves_nothing(pool):
    with refused("split_examples", "`train`", "got 4", "smallest class has 4"):
        split_examples(KEY, pool, 4)
    with refused("split_classes", "`train`", "got 3", "the pool has 3"):
        split_classes(KEY, pool, 3)


def test_a_split_inside_of_jit(pool):
    for split in (split_classes, split_examples):
        with refused(split.__name__, "`pool`", "traced"):
            jax.jit(lambda pool, split=split: split(KEY, pool, 2))(pool)
