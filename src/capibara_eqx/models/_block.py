import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from ..internal import check_probability, split_or_none, zero_padding
from ..layers import AbstractSequenceMixer, Dropout, RMSNorm


class AbstractBlock(eqx.Module):
    """A part of a `Stack`: it keeps the residual stream's width and can be streamed.

    As `AbstractSequenceMixer`, but `__call__` returns `(y, aux)` always.

    !!! example

        ```python
        block: AbstractBlock = ResidualBlock(mixer, 64)
        y, aux = block(x)
        y, cache = block.prefill(x, block.init_cache((2,)))
        ```
    """

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], PyTree]:
        """The new residual stream and what the layers report."""

    @abc.abstractmethod
    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Any:
        """See `AbstractSequenceMixer.init_cache`."""

    @abc.abstractmethod
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Any,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], Any]:
        """See `AbstractSequenceMixer.prefill`; there is no dropout."""

    @abc.abstractmethod
    def step(
        self, x: Float[Array, "*batch d_model"], cache: Any
    ) -> tuple[Float[Array, "*batch d_model"], Any]:
        """See `AbstractSequenceMixer.step`; there is no dropout."""


class ResidualBlock(AbstractBlock):
    r"""A pre-norm residual around a sequence mixer.

    $$y = x + \mathrm{dropout}(\mathrm{mixer}(\mathrm{norm}(x)))$$

    Xiong et al., *On Layer Normalization in the Transformer Architecture*, arXiv
    2002.04745. Norm and dropout act on each token, so the block streams as its mixer
    does.

    !!! example

        ```python
        block = ResidualBlock(Mamba(64, key=jax.random.key(0)), 64)
        y, aux = block(x)                              # aux: what the mixer reports
        ```
    """

    norm: RMSNorm
    mixer: AbstractSequenceMixer
    dropout: Dropout

    def __init__(
        self,
        mixer: AbstractSequenceMixer,
        d_model: int,
        dropout: float = 0.0,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `mixer`: from `d_model` to `d_model`; it may return `(y, aux)`.
        - `d_model`: width of the residual stream.
        - `dropout`: probability of dropping an element of the mixer's output.
        - `eps`: of the norm.
        - `dtype`: of the norm's weight; float32 if not given.

        **Raises:**

        `ValueError` for a `d_model` that is not positive or a `dropout` outside [0, 1].
        """
        check_probability("dropout", dropout)
        self.norm = RMSNorm(d_model, eps, dtype=dtype)
        self.mixer = mixer
        self.dropout = Dropout(dropout)

    @jax.named_scope("capibara_eqx.models.ResidualBlock")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], PyTree]:
        """**Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `segment_ids`: document of each token, `(*batch, seq)`; negative is padding.
        - `key`: for dropout and for mixers that draw random numbers.

        **Returns:**

        `(y, aux)`: the new residual stream and what the mixer reports, `None` if it
        reports nothing.

        **Raises:**

        `ValueError` if dropout is active and there is no `key`, or if the mixer does
        not keep the width.
        """
        mixer_key, dropout_key = split_or_none(key, 2)
        seen = self.norm(zero_padding(x, segment_ids))
        out = self.mixer(seen, segment_ids=segment_ids, key=mixer_key)
        y, aux = out if isinstance(out, tuple) else (out, None)
        return add("ResidualBlock", "mixer", x, self.dropout(y, key=dropout_key)), aux

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Any:
        """The mixer's cache, see `AbstractSequenceMixer.init_cache`."""
        return self.mixer.init_cache(batch_shape, max_len=max_len)

    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Any,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], Any]:
        """See `AbstractSequenceMixer.prefill`; there is no dropout."""
        seen = self.norm(zero_padding(x, segment_ids))
        y, cache = self.mixer.prefill(seen, cache, segment_ids=segment_ids)
        return add("ResidualBlock", "mixer", x, y), cache

    def step(
        self, x: Float[Array, "*batch d_model"], cache: Any
    ) -> tuple[Float[Array, "*batch d_model"], Any]:
        """See `AbstractSequenceMixer.step`; there is no dropout."""
        y, cache = self.mixer.step(self.norm(x), cache)
        return add("ResidualBlock", "mixer", x, y), cache


def add(
    block: str, layer: str, x: Float[Array, "*shape"], y: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """The sum of the residual stream and a layer's output, of one shape."""
    if y.shape != x.shape:
        raise ValueError(
            f"{block}: the {layer} must keep the shape of its input, "
            f"{x.shape}, got {y.shape}. Build it with equal widths in and out, or "
            "project its output."
        )
    return x + y
