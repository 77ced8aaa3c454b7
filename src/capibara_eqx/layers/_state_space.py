import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_choice,
    check_last_axis,
    check_probability,
    check_segment_ids,
    check_sequence,
    check_size,
    zero_padding,
)
from ._cache import advance_segment, check_cache, fresh_segment
from ._mixer import AbstractSequenceMixer
from ._state_space_output import StateSpaceOutput
from ._state_space_scan import (
    AbstractSystem,
    convolve,
    read_chunks,
    read_packed,
    read_tokens,
)
from ._step_size import check_step_range


MODES = ("convolution", "chunked", "recurrent")


class StateSpaceCache(eqx.Module):
    """The state of every channel, and the document that it belongs to.

    States are real: the real parts of one state of each conjugate pair, then their
    imaginary parts.
    """

    state: Float[Array, "*batch d_model d_state"]
    segment: Int[Array, "*batch"]


class AbstractStateSpace(AbstractSequenceMixer):
    """A mixer of one linear time-invariant system a channel: `S4D`, `S4`.

    They differ in the systems that they make of their parameters.
    """

    log_dt: eqx.AbstractVar[Float[Array, " d_model"]]
    D: eqx.AbstractVar[Float[Array, " d_model"]]
    output: eqx.AbstractVar[StateSpaceOutput]
    d_model: eqx.AbstractVar[int]
    d_state: eqx.AbstractVar[int]
    mode: eqx.AbstractVar[str]
    chunk_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def _system(self, dtype: DTypeLike) -> AbstractSystem:
        """The discrete systems, in the real `dtype` and its complex companion."""

    def kernel(self, length: int) -> Float[Array, "length d_model"]:
        """What comes out of each channel after an impulse, without the skip `D`.

        **Arguments:**

        - `length`: number of tokens.

        **Returns:**

        `(length, d_model)`, float32 or wider.

        **Raises:**

        `ValueError` for a length that is not positive.
        """
        check_size("length", length)
        return self._system(accumulator_dtype(self.log_dt.dtype)).kernel(length)

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`; `key` is for dropout.

        **Raises:**

        `ValueError` for an input that does not fit, or active dropout without a key.
        """
        name = type(self).__name__
        check_sequence(name, "x", x, self.d_model)
        with jax.named_scope(f"capibara_eqx.layers.{name}"):
            if self._convolves(x, segment_ids):
                y = self._convolved(x)
            else:
                cache = self.init_cache(x.shape[:-2])
                y, _ = self._read(x, cache, segment_ids, self.mode)
            y = self.output(y, x.dtype, key=key)
            return zero_padding(y, segment_ids)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> StateSpaceCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        shape = (*batch_shape, self.d_model, self.d_state)
        state = jnp.zeros(shape, accumulator_dtype(self.log_dt.dtype))
        return StateSpaceCache(state, fresh_segment(batch_shape))

    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: StateSpaceCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], StateSpaceCache]:
        """See `AbstractSequenceMixer.prefill`; in chunks, and there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        name = type(self).__name__
        check_sequence(name, "x", x, self.d_model)
        check_cache(name, cache, eqx.filter_eval_shape(self.init_cache, x.shape[:-2]))
        with jax.named_scope(f"capibara_eqx.layers.{name}.prefill"):
            y, cache = self._read(x, cache, segment_ids, "chunked")
            return zero_padding(self.output.streamed(y, x.dtype), segment_ids), cache

    def step(
        self, x: Float[Array, "*batch d_model"], cache: StateSpaceCache
    ) -> tuple[Float[Array, "*batch d_model"], StateSpaceCache]:
        """See `AbstractSequenceMixer.step`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        name = type(self).__name__
        check_last_axis(f"{name}.step", "x", x, self.d_model)
        check_cache(name, cache, eqx.filter_eval_shape(self.init_cache, x.shape[:-1]))
        with jax.named_scope(f"capibara_eqx.layers.{name}.step"):
            y, cache = self._read(x[..., None, :], cache, None, "recurrent")
            return self.output.streamed(y[..., 0, :], x.dtype), cache

    def _convolves(self, x, segment_ids):
        long = x.shape[-2] > self.chunk_size
        return self.mode == "convolution" and segment_ids is None and long

    def _convolved(self, x):
        dtype = accumulator_dtype(x.dtype, self.log_dt.dtype)
        u = x.astype(dtype)
        return convolve(u, self._system(dtype).kernel(x.shape[-2])) + self._skip(u)

    def _skip(self, u):
        D = accumulate(self.D).astype(u.dtype)
        return jnp.broadcast_to(D, u.shape) * u

    def _read(self, x, cache, segment_ids, mode):
        """What the output stage gets, and the new cache."""
        check_segment_ids(type(self).__name__, segment_ids, x.shape[:-1])
        dtype = accumulator_dtype(x.dtype, self.log_dt.dtype)
        system = self._system(dtype)
        u = zero_padding(x, segment_ids).astype(dtype)
        # Inside `jax.shard_map` a state is typed like what it will meet.
        h = cache.state.astype(dtype) + jnp.zeros_like(u[..., 0, :, None])
        # A batch axis of one element would keep XLA's CPU backend from vectorising.
        batch = x.shape[:-2]
        lead = () if math.prod(batch) == 1 else batch
        u, h = (part.reshape(*lead, *part.shape[len(batch) :]) for part in (u, h))
        if segment_ids is not None:
            ids = segment_ids.reshape(*lead, x.shape[-2])
            before = cache.segment.reshape(lead).astype(ids.dtype)
            y, h = read_packed(system, u, h, self.chunk_size, ids, before)
        elif mode == "recurrent":
            y, h = read_tokens(system, u, h)
        else:
            y, h = read_chunks(system, u, h, self.chunk_size)
        y = (y + self._skip(u)).reshape(x.shape)
        state = h.reshape(cache.state.shape).astype(cache.state.dtype)
        segment = advance_segment(cache.segment, segment_ids)
        return y, StateSpaceCache(state, segment)


def check_state_space(
    d_model: int,
    d_state: int,
    dt_min: float,
    dt_max: float,
    dropout_rate: float,
    mode: str,
    chunk_size: int,
) -> None:
    """Raise `ValueError` for arguments that `S4D` and `S4` refuse alike."""
    sizes = {"d_model": d_model, "d_state": d_state, "chunk_size": chunk_size}
    for name, value in sizes.items():
        check_size(name, value)
    if d_state % 2:
        raise ValueError(
            f"`d_state` must be even, got {d_state}: states come in conjugate pairs, "
            "of which one is kept."
        )
    check_step_range(dt_min, dt_max)
    check_probability("dropout_rate", dropout_rate)
    check_choice("mode", mode, MODES)


def complex_normal(
    shape: tuple[int, ...], dtype: DTypeLike, *, key: PRNGKeyArray
) -> Float[Array, "*shape 2"]:
    """Complex numbers of variance one, as pairs of real ones."""
    return jax.random.normal(key, (*shape, 2), dtype) / math.sqrt(2)


def from_pairs(
    pairs: Float[Array, "*shape 2"], dtype: DTypeLike
) -> Complex[Array, "*shape"]:
    """The complex numbers of pairs of real ones, whose dtype becomes `dtype`."""
    wide = accumulate(pairs).astype(dtype)
    return jax.lax.complex(wide[..., 0], wide[..., 1])
