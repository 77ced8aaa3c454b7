"""How a cost grows with the length of a sequence."""

from collections.abc import Iterable

import numpy as np


# Below, a call costs about as much as its work; above, memory is short.
SHORTEST, LONGEST = 2048, 131072


def slope(points: Iterable[tuple[float, float]]) -> float | None:
    """The slope of the least-squares line through the logarithms, one if linear.

    **Arguments:**

    - `points`: length and cost; lengths outside of [2048, 131072] do not count.

    **Returns:**

    The slope, `None` if fewer than two points are left.
    """
    kept = [(n, cost) for n, cost in points if SHORTEST <= n <= LONGEST and cost > 0]
    if len({n for n, _ in kept}) < 2:
        return None
    lengths, costs = np.log(np.array(kept, float)).T
    return float(np.polyfit(lengths, costs, 1)[0])
