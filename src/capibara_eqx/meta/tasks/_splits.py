"""Two ways to keep a part of a pool for the test: of the classes or of each class."""

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from ...internal import check_size
from ._class_pool import ClassPool, known, pool_of


def split_examples(
    key: PRNGKeyArray, pool: ClassPool, train: int
) -> tuple[ClassPool, ClassPool]:
    """Hold out examples: both parts have all classes, no example is in both.

    **Arguments:**

    - `key`: chooses the examples.
    - `pool`: what is split, outside of `jit`.
    - `train`: examples of each class in the first part; the second has the rest.

    **Returns:**

    `(train, test)`.

    **Raises:**

    `ValueError` for a `train` that is not positive or leaves nothing of a class.

    !!! example

        ```python
        train, test = split_examples(key, pool, 4)
        ```
    """
    check_size("train", train)
    if train >= pool.smallest:
        raise ValueError(
            f"split_examples: `train` must leave at least one example of each class, "
            f"got {train}; the smallest class has {pool.smallest}."
        )
    counts, x = (known("split_examples", "pool", a) for a in (pool.counts, pool.x))
    of_class = np.repeat(np.arange(len(counts)), counts)
    # Within each class, which stays where it is, in the order of random numbers.
    order = np.lexsort((np.asarray(jax.random.uniform(key, of_class.shape)), of_class))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = rank < train
    return (
        pool_of(x[order[first]], np.full_like(counts, train)),
        pool_of(x[order[~first]], counts - train),
    )


def split_classes(
    key: PRNGKeyArray, pool: ClassPool, train: int
) -> tuple[ClassPool, ClassPool]:
    """Hold out classes: no class is in both parts.

    This asks for more than `split_examples`, and needs many classes: with a handful to
    learn from, what is learned may serve new ones worse than the raw input.

    **Arguments:**

    - `key`: chooses the classes.
    - `pool`: what is split, outside of `jit`.
    - `train`: classes in the first part; the second has the rest.

    **Returns:**

    `(train, test)`.

    **Raises:**

    `ValueError` for a `train` that is not positive or leaves no class.

    !!! example

        ```python
        train, test = split_classes(key, pool, 5)
        ```
    """
    check_size("train", train)
    if train >= pool.num_classes:
        raise ValueError(
            f"split_classes: `train` must leave at least one class, got {train}; the "
            f"pool has {pool.num_classes}."
        )
    counts, x = (known("split_classes", "pool", a) for a in (pool.counts, pool.x))
    order = np.asarray(jax.random.permutation(key, pool.num_classes))
    of_class = np.repeat(np.arange(len(counts)), counts)

    def part(classes):
        rows = np.flatnonzero(np.isin(of_class, classes))
        return pool_of(x[rows], counts[np.sort(classes)])

    return part(order[:train]), part(order[train:])
