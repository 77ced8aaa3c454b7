import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import check_positive, check_range


def check_step_range(dt_min: float, dt_max: float, floor: float = 0.0) -> None:
    """Raise `ValueError` unless step sizes can be drawn from `[dt_min, dt_max]`."""
    check_positive("dt_min", dt_min)
    check_positive("dt_max", dt_max)
    if dt_min > dt_max:
        raise ValueError(
            "`dt_min` must not be greater than `dt_max`, got "
            f"dt_min={dt_min} and dt_max={dt_max}. Are they swapped?"
        )
    check_range("dt_init_floor", floor, least=0, hint="0 sets none.")


def log_step(
    shape: tuple[int, ...],
    dt_min: float,
    dt_max: float,
    dtype: DTypeLike,
    *,
    key: PRNGKeyArray,
) -> Float[Array, "*shape"]:
    """Logarithms of step sizes, uniform between those of `dt_min` and `dt_max`."""
    low, high = math.log(dt_min), math.log(dt_max)
    return low + jax.random.uniform(key, shape, dtype) * (high - low)


def step_bias(
    size: int,
    dt_min: float,
    dt_max: float,
    floor: float,
    dtype: DTypeLike,
    *,
    key: PRNGKeyArray,
) -> Float[Array, " size"]:
    """What softplus takes to step sizes that are log-uniform, none below `floor`."""
    dt = jnp.maximum(jnp.exp(log_step((size,), dt_min, dt_max, dtype, key=key)), floor)
    return dt + jnp.log(-jnp.expm1(-dt))
