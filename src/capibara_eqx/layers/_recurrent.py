import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..internal import check_last_axis, check_segment_ids, check_sequence
from ._cache import check_cache
from ._mixer import AbstractSequenceMixer


class AbstractRecurrent(AbstractSequenceMixer):
    """A mixer that does the same to a row, to a piece of it and to one token.

    Each reads on from a state: a call from that of a fresh cache. They differ in what
    the state is and how it is read, `init_cache` and `_read`.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def _read(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Any,
        segment_ids: Int[Array, "*batch seq"] | None,
    ) -> tuple[Float[Array, "*batch seq d_model"], Any]:
        """The outputs, and the cache after them; the arguments have been checked."""

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`; `key` is ignored.

        **Raises:**

        `ValueError` for an input that does not fit.
        """
        del key
        name = type(self).__name__
        check_sequence(name, "x", x, self.d_model)
        check_segment_ids(name, segment_ids, x.shape[:-1])
        with jax.named_scope(f"capibara_eqx.layers.{name}"):
            return self._read(x, self.init_cache(x.shape[:-2]), segment_ids)[0]

    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Any,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], Any]:
        """See `AbstractSequenceMixer.prefill`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        name = type(self).__name__
        check_sequence(name, "x", x, self.d_model)
        check_segment_ids(name, segment_ids, x.shape[:-1])
        check_cache(name, cache, eqx.filter_eval_shape(self.init_cache, x.shape[:-2]))
        with jax.named_scope(f"capibara_eqx.layers.{name}.prefill"):
            return self._read(x, cache, segment_ids)

    def step(
        self, x: Float[Array, "*batch d_model"], cache: Any
    ) -> tuple[Float[Array, "*batch d_model"], Any]:
        """See `AbstractSequenceMixer.step`: the recurrence, without a chunk.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        name = type(self).__name__
        check_last_axis(f"{name}.step", "x", x, self.d_model)
        with jax.named_scope(f"capibara_eqx.layers.{name}.step"):
            y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache
