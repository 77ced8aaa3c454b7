import math

import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import check_positive


def check_step_sizes(dt_min: float, dt_max: float) -> None:
    """Raise `ValueError` unless both are positive and in this order."""
    check_positive("dt_min", dt_min)
    check_positive("dt_max", dt_max)
    if dt_min > dt_max:
        raise ValueError(
            "`dt_min` must not be greater than `dt_max`, got "
            f"dt_min={dt_min} and dt_max={dt_max}. Are they swapped?"
        )


def log_step_sizes(
    shape: tuple[int, ...],
    dt_min: float,
    dt_max: float,
    dtype: DTypeLike,
    *,
    key: PRNGKeyArray,
) -> Float[Array, "*shape"]:
    """Logarithms of step sizes, uniform between those of `dt_min` and `dt_max`."""
    low, high = math.log(dt_min), math.log(dt_max)
    return low + (high - low) * jax.random.uniform(key, shape, dtype)
