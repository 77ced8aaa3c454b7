import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ...internal import check_size
from .._task import Task
from ._class_pool import ClassPool
from ._draw import draw


def sample_episodes(
    key: PRNGKeyArray,
    num_tasks: int,
    pool: ClassPool,
    *,
    ways: int,
    shots: int,
    queries: int,
) -> Task:
    r"""Few-shot classification: a few classes, named anew in each task.

    A task draws `ways` classes and calls them 0, 1, ... in the order drawn, so that
    no name means anything outside of it; then `shots + queries` examples of each,
    nothing twice within a task. Vinyals et al., *Matching Networks*, arXiv 1606.04080.

    The work of a draw does not depend on the number of classes or examples, so it may
    stand inside of a compiled training step, with the pool as an argument of it.

    **Arguments:**

    - `key`: everything follows from it.
    - `num_tasks`: length of the leading axis.
    - `pool`: the examples, see `split_examples` and `split_classes`.
    - `ways`: classes in a task.
    - `shots`: examples of each class to learn from.
    - `queries`: examples of each class to be judged by.

    **Returns:**

    A `Task` of pairs `(x, y)`: `(num_tasks, ways * shots, ...)` in the dtype of the
    pool and integers `(num_tasks, ways * shots)` to learn from, as many with `queries`
    to be judged by. They are sorted by label.

    **Raises:**

    `ValueError` for a `pool` that is none, a size that is not positive, or fewer
    classes or examples of one than a task needs.

    !!! example

        ```python
        tasks = sample_episodes(key, 8, pool, ways=5, shots=1, queries=3)
        x, y = tasks.support                                    # (8, 5, ...), (8, 5)
        ```
    """
    sizes = {
        "num_tasks": num_tasks,
        "ways": ways,
        "shots": shots,
        "queries": queries,
    }
    for name, size in sizes.items():
        check_size(name, size)
    if not isinstance(pool, ClassPool):
        raise ValueError(
            "sample_episodes: `pool` must be a ClassPool, got "
            f"{type(pool).__name__}. Make it of examples and labels: "
            "`meta.tasks.ClassPool.init(x, labels)`."
        )
    _check(pool, ways, shots, queries)
    each = shots + queries

    def rows(key):
        class_key, example_key = jax.random.split(key)
        classes = draw(class_key, pool.num_classes, ways)
        keys = jax.random.split(example_key, ways)
        counts = pool.counts[classes]
        within = jax.vmap(draw, in_axes=(0, 0, None))(keys, counts, each)
        return pool.starts[classes][:, None] + within

    chosen = jax.vmap(rows)(jax.random.split(key, num_tasks))

    def labelled(rows, count):
        labels = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count)
        x = pool.x[rows.reshape(num_tasks, -1)]
        return x, jnp.broadcast_to(labels, (num_tasks, ways * count))

    return Task(
        labelled(chosen[:, :, :shots], shots),
        labelled(chosen[:, :, shots:], queries),
    )


def _check(pool: ClassPool, ways: int, shots: int, queries: int) -> None:
    if ways > pool.num_classes:
        raise ValueError(
            f"sample_episodes: `ways` must be at most the number of classes, got "
            f"{ways} of {pool.num_classes}. Ask for fewer, or split the pool by "
            "`split_examples`, which leaves all classes on both sides."
        )
    if shots + queries > pool.smallest:
        raise ValueError(
            f"sample_episodes: `shots` + `queries` must be at most the number of "
            f"examples of the smallest class, got {shots} + {queries} of "
            f"{pool.smallest}. No example is drawn twice in a task: ask for fewer, or "
            "leave small classes out of the pool."
        )
