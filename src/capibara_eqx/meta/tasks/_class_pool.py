import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Shaped


class ClassPool(eqx.Module):
    """Examples sorted by class, to draw episodes from.

    - `x`: `(examples, ...)`, one class after the other.
    - `starts`, `counts`: `(classes,)`, where each class begins and how many it has.
    - `smallest`: how many examples the smallest class has.

    Pass a pool to compiled functions as an argument: one that they close over is
    compiled into them as a constant, which may take minutes.

    !!! example

        ```python
        images, labels = jnp.zeros((60, 8, 8)), jnp.arange(60) % 10
        pool = ClassPool.init(images, labels)
        tasks = sample_episodes(key, 8, pool, ways=5, shots=1, queries=3)
        ```
    """

    x: Shaped[Array, "examples ..."]
    starts: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    smallest: int = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        x: Shaped[Array | np.ndarray, "examples ..."],
        labels: Shaped[Array | np.ndarray, " examples"],
    ) -> "ClassPool":
        """Sort examples by label; outside of `jit`.

        **Arguments:**

        - `x`: `(examples, ...)`.
        - `labels`: `(examples,)`, any integers.

        **Raises:**

        `ValueError` if there are no examples, if there is not one label an example, or
        if labels are not integers.
        """
        _check(x, labels)
        values = known("ClassPool", "labels", labels)
        order = np.argsort(values, kind="stable")
        _, counts = np.unique(values, return_counts=True)
        return pool_of(known("ClassPool", "x", x)[order], counts)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.counts.shape[0]


def pool_of(x: Shaped[np.ndarray, "examples ..."], counts: np.ndarray) -> ClassPool:
    """A pool of sorted examples, of which `counts` belong to each class in turn."""
    starts = np.cumsum(counts) - counts
    return ClassPool(
        jnp.asarray(x),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(counts, jnp.int32),
        int(counts.min()),
    )


def known(
    function: str, argument: str, array: Shaped[Array | np.ndarray, "..."]
) -> np.ndarray:
    """The values of `array`, `ValueError` if it is traced."""
    if isinstance(array, Tracer):
        raise ValueError(
            f"{function}: `{argument}` must be known, got a traced array: shapes "
            "follow from it. Make the pool outside of `jit` and pass it as an "
            "argument; `sample_episodes` runs inside."
        )
    return np.asarray(array)


def _check(x, labels) -> None:
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(
            f"ClassPool: `x` must hold at least one example, (examples, ...), got "
            f"shape {x.shape}."
        )
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"ClassPool: `labels` must be one an example, ({x.shape[0]},), got shape "
            f"{labels.shape}. Of one-hot labels take `labels.argmax(-1)`."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"ClassPool: `labels` must be integers, got {labels.dtype}. Convert them, "
            "as in `labels.astype(int)`, or number the names by "
            "`np.unique(labels, return_inverse=True)[1]`."
        )
