from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from ..internal import check_probability, split_or_none, zero_padding
from ..layers import AbstractSequenceMixer, Dropout, MixtureOfRookies, MoE, RMSNorm
from ._block import AbstractBlock, add


class TransformerBlock(AbstractBlock):
    r"""A pre-norm residual around a sequence mixer, then one around a feed-forward.

    $$h = x + \mathrm{dropout}(\mathrm{mixer}(\mathrm{norm}(x))), \quad
    y = h + \mathrm{dropout}(\mathrm{ff}(\mathrm{norm}(h)))$$

    Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, with the norms in
    front as in Xiong et al., arXiv 2002.04745. The mixer may be any: attention, or
    `Mamba`. All but the mixer acts on each token, so the block streams as its mixer
    does.

    !!! example

        ```python
        k1, k2 = jax.random.split(key)
        attention = Attention(64, 8, rope_enabled=True, key=k1)
        block = TransformerBlock(attention, SwiGLU(64, 176, key=k2), 64)
        y, aux = block(x)                  # aux: what mixer and feed-forward report
        ```
    """

    mixer_norm: RMSNorm
    mixer: AbstractSequenceMixer
    feed_forward_norm: RMSNorm
    feed_forward: Callable[..., Any]
    dropout: Dropout

    def __init__(
        self,
        mixer: AbstractSequenceMixer,
        feed_forward: Callable[..., Any],
        d_model: int,
        dropout: float = 0.0,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
    ):
        """**Arguments:**

        - `mixer`: from `d_model` to `d_model`; it may return `(y, aux)`.
        - `feed_forward`: a layer of each token, as `SwiGLU`, `GLU`, `MLP`, `MoE`, or
            `MixtureOfRookies`.
        - `d_model`: width of the residual stream.
        - `dropout`: probability of dropping an element of either output.
        - `eps`: of the norms.
        - `dtype`: of the norms' weights; float32 if not given.

        **Raises:**

        `ValueError` for a `d_model` that is not positive or a `dropout` outside [0, 1].
        """
        check_probability("dropout", dropout)
        self.mixer_norm = RMSNorm(d_model, eps, dtype=dtype)
        self.mixer = mixer
        self.feed_forward_norm = RMSNorm(d_model, eps, dtype=dtype)
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)

    @jax.named_scope("capibara_eqx.models.TransformerBlock")
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
        - `key`: for dropout, and for layers that draw random numbers.

        **Returns:**

        `(y, aux)`: the new residual stream, and a pair of what the mixer and the
        feed-forward report, `None` where one reports nothing.

        **Raises:**

        `ValueError` if dropout is active and there is no `key`, or if a layer does not
        keep the width.
        """
        mixer_key, ff_key, *dropout_keys = split_or_none(key, 4)
        seen = self.mixer_norm(zero_padding(x, segment_ids))
        out = self.mixer(seen, segment_ids=segment_ids, key=mixer_key)
        y, mixer_aux = out if isinstance(out, tuple) else (out, None)
        x = add("TransformerBlock", "mixer", x, self.dropout(y, key=dropout_keys[0]))
        y, ff_aux = self._feed_forward(x, segment_ids, ff_key)
        y = self.dropout(y, key=dropout_keys[1])
        x = add("TransformerBlock", "feed-forward", x, y)
        return x, (mixer_aux, ff_aux)

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
        seen = self.mixer_norm(zero_padding(x, segment_ids))
        y, cache = self.mixer.prefill(seen, cache, segment_ids=segment_ids)
        x = add("TransformerBlock", "mixer", x, y)
        y, _ = self._feed_forward(x, segment_ids, None)
        return add("TransformerBlock", "feed-forward", x, y), cache

    def step(
        self, x: Float[Array, "*batch d_model"], cache: Any
    ) -> tuple[Float[Array, "*batch d_model"], Any]:
        """See `AbstractSequenceMixer.step`; there is no dropout."""
        y, cache = self.mixer.step(self.mixer_norm(x), cache)
        x = add("TransformerBlock", "mixer", x, y)
        y, _ = self._feed_forward(x, None, None)
        return add("TransformerBlock", "feed-forward", x, y), cache

    def _feed_forward(
        self,
        x: Float[Array, "*batch d_model"],
        segment_ids: Int[Array, "*batch"] | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "*batch d_model"], PyTree]:
        if segment_ids is not None:
            x = zero_padding(x, segment_ids)
        x = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoE | MixtureOfRookies):
            # Padding takes no place at an expert and counts in no loss.
            mask: Bool[Array, "*batch"] | None = (
                None if segment_ids is None else segment_ids >= 0
            )
            return self.feed_forward(x, mask=mask, key=key)
        out = self.feed_forward(x, key=key)
        y, aux = out if isinstance(out, tuple) else (out, None)
        return y if segment_ids is None else zero_padding(y, segment_ids), aux
