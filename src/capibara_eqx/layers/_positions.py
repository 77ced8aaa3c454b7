import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Integer, PRNGKeyArray

from ..internal import accumulator_dtype, check_ids, check_positive, check_size
from ._id_range import ids_in_range


@jax.named_scope("capibara_eqx.layers.sinusoidal_positions")
def sinusoidal_positions(
    positions: Integer[Array, "*batch"],
    d_model: int,
    base: float = 10000.0,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch {d_model}"]:
    r"""Sines and cosines of a position at falling frequencies.

    $$P_{2i} = \sin(p\, b^{-2i/d}), \quad P_{2i+1} = \cos(p\, b^{-2i/d})$$

    Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, section 3.5. Sines
    and cosines alternate, as there; with an odd `d_model` the last sine has no cosine.

    The angle is reduced to one turn in integers before it becomes a float, so that a
    float32 result is as good at position 1,000,000 as at position 1.

    **Arguments:**

    - `positions`: `(*batch,)`, any shape, from $-2^{31}$ to $2^{31} - 1$.
    - `d_model`: number of values for each position.
    - `base`: $b$; the longest wavelength is nearly $2 \pi b$ positions.
    - `dtype`: of the result; float32 if not given. Computed in float32 or wider.

    **Returns:**

    `(*batch, d_model)`.

    **Raises:**

    `ValueError` for positions that are not integers, a `d_model` or `base` that is not
    positive.

    !!! example

        ```python
        p = sinusoidal_positions(jnp.arange(5), 64)    # (5, 64)
        ```
    """
    check_ids("sinusoidal_positions", "positions", positions)
    check_size("d_model", d_model)
    check_positive("base", base)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    channel = np.arange(d_model)
    frequency = float(base) ** (-2 * (channel // 2) / d_model)
    positions = positions.astype(jnp.int32)[..., None]
    positions = jnp.broadcast_to(positions, (*positions.shape[:-1], d_model))
    # A cosine is a sine a quarter of a turn later.
    quarters = channel % 2
    if accumulator_dtype(dtype) == jnp.float32:
        turns = frequency / (2 * math.pi)
        return jnp.sin(_reduced_angle(positions, turns, quarters)).astype(dtype)
    frequency = jnp.broadcast_to(jnp.asarray(frequency, dtype), positions.shape)
    shift = jnp.asarray(quarters * (math.pi / 2), dtype)
    angle = positions.astype(dtype) * frequency
    return jnp.sin(angle + jnp.broadcast_to(shift, angle.shape))


def _reduced_angle(
    positions: Int[Array, "*shape"],
    turns: Float[np.ndarray, " d_model"],
    quarters: Int[np.ndarray, " d_model"],
) -> Float[Array, "*shape"]:
    """The angle after `turns` a position, less whole ones: between -pi and pi.

    In units of 2^-32 turns whole turns drop out of a sum of uint32. A position goes in
    byte by byte, so that a factor's rounding, half a unit, grows by 2^8 at most and
    not by the position.
    """

    def units(turns):
        counts = np.round(turns % 1.0 * 2.0**32) % 2.0**32
        return jnp.broadcast_to(jnp.asarray(counts.astype("uint32")), positions.shape)

    angle = units(quarters / 4)
    for shift in (0, 8, 16, 24):
        part = positions >> shift  # the last keeps the sign
        part = part if shift == 24 else part & 255
        angle = angle + part.astype(jnp.uint32) * units(turns * 2.0**shift)
    signed = jax.lax.bitcast_convert_type(angle, jnp.int32)
    return signed.astype(jnp.float32) * (2 * math.pi / 2**32)


class LearnedPositions(eqx.Module):
    """A table of one learned vector for each position.

    Gehring et al., *Convolutional Sequence to Sequence Learning*, arXiv 1705.03122.
    `weight_decay_mask` leaves the table alone.

    !!! example

        ```python
        learned = LearnedPositions(16, 64, key=jax.random.key(0))
        p = learned(jnp.arange(5))                     # (5, 64)
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"weight"})

    weight: Float[Array, "{self.max_len} {self.d_model}"]
    max_len: int = eqx.field(static=True)
    d_model: int = eqx.field(static=True)

    def __init__(
        self,
        max_len: int,
        d_model: int,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `max_len`: number of positions.
        - `d_model`: length of each vector.
        - `dtype`: of the table; float32 if not given.
        - `key`: for the initial values, normal with standard deviation 0.02.

        **Raises:**

        `ValueError` for a size that is not positive.
        """
        check_size("max_len", max_len)
        check_size("d_model", d_model)
        dtype = jnp.float32 if dtype is None else dtype
        self.weight = 0.02 * jax.random.normal(key, (max_len, d_model), dtype)
        self.max_len = max_len
        self.d_model = d_model

    @jax.named_scope("capibara_eqx.layers.LearnedPositions")
    def __call__(
        self, positions: Integer[Array, "*batch"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_model"]:
        """**Arguments:**

        - `positions`: `(*batch,)`, any shape, in `[0, max_len)`.
        - `key`: ignored.

        **Returns:**

        `(*batch, d_model)`, in the dtype of the table.

        **Raises:**

        `ValueError` for positions that are not integers; at run time, under `jit` too,
        an error for a position outside.
        """
        del key
        hint = "Build the layer with a `max_len` of the longest document to be read."
        positions = ids_in_range(
            "LearnedPositions", "positions", positions, self.max_len, hint
        )
        return jnp.take(self.weight, positions, axis=0)
