from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PRNGKeyArray

from ...internal import check_choice
from .._task import Task
from ._episodes import sample_episodes
from ._linear_regressions import sample_linear_regressions
from ._sinusoids import sample_sinusoids


_KINDS: Mapping[str, Callable[..., Task]] = {
    "sinusoids": sample_sinusoids,
    "linear_regressions": sample_linear_regressions,
    "episodes": sample_episodes,
}


def sample_tasks(
    key: PRNGKeyArray, num_tasks: int, kind: str = "sinusoids", **options: Any
) -> Task:
    """Tasks of a kind that is chosen by its name, as from a configuration.

    **Arguments:**

    - `key`: everything follows from it.
    - `num_tasks`: length of the leading axis.
    - `kind`: `"sinusoids"`, `"linear_regressions"` or `"episodes"`.
    - `options`: of `sample_sinusoids`, `sample_linear_regressions` or
        `sample_episodes`.

    **Returns:**

    A `Task` whose arrays have a leading axis of tasks.

    **Raises:**

    `ValueError` for an unknown `kind`, `TypeError` for options that it does not have,
    and what the function of that kind raises.

    !!! example

        ```python
        tasks = sample_tasks(key, 8, shots=5, queries=5)
        tasks = sample_tasks(
            key, 8, "episodes", pool=pool, ways=5, shots=1, queries=3
        )
        ```
    """
    check_choice("kind", kind, _KINDS)
    return _KINDS[kind](key, num_tasks, **options)
