import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Integer, PRNGKeyArray

from ..arrays import as_array
from ..internal import (
    accumulate,
    check_choice,
    check_ids,
    check_probability,
    check_segment_ids,
    check_size,
    segment_positions,
    zero_padding,
)
from ._cache import advance_segment, check_cache, fresh_segment
from ._dropout import Dropout
from ._embedding import Embedding
from ._id_range import ids_in_range
from ._positions import LearnedPositions, sinusoidal_positions


class EmbeddingCache(eqx.Module):
    """How much of the current document was read: the next token's position."""

    length: Int[Array, "*batch"]
    segment: Int[Array, "*batch"]


class TokenEmbedding(eqx.Module):
    r"""Token ids to vectors, with the position in the document if wanted.

    $$x_t = \mathrm{dropout}(s\, E[\mathrm{token}_t] + P[t]), \quad
    s = \sqrt{d_{model}} \text{ or } 1$$

    Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762. Positions count from
    the start of each document, leave padding out, and go on from a cache, so that
    `__call__`, `prefill` and `step` agree as those of an `AbstractSequenceMixer` do.
    The output at padding is zero.

    Ids are checked at run time through a call back to the host, which `jax.export`
    cannot carry: trace what is to be exported under `EQX_ON_ERROR=nan`.

    Sines and cosines have size 1, the table starts at 0.02: with
    `positions="sinusoidal"` set `scale=True`, as in the paper.

    !!! example

        ```python
        embed = TokenEmbedding(256, 64, "learned", max_len=16, key=jax.random.key(0))
        y = embed(tokens)                              # (*batch, seq, 64)
        y, cache = embed.prefill(tokens, embed.init_cache((2,)))
        y_t, cache = embed.step(tokens[:, 0], cache)   # one token more
        logits = embed.attend(y)                       # (*batch, seq, 256): a tied head
        ```
    """

    table: Embedding
    learned: LearnedPositions | None
    dropout: Dropout
    vocab_size: int = eqx.field(static=True)
    d_model: int = eqx.field(static=True)
    positions: str = eqx.field(static=True)
    scale: bool = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        positions: str = "none",
        max_len: int | None = None,
        scale: bool = False,
        dropout_p: float = 0.0,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `vocab_size`: number of ids.
        - `d_model`: length of each vector.
        - `positions`: what is added for the position: `"none"`, `"learned"` (a
            `LearnedPositions` of `max_len`) or `"sinusoidal"`
            (`sinusoidal_positions`, any length).
        - `max_len`: tokens of the longest document; for learned positions only.
        - `scale`: whether vectors of the table are multiplied by
            $\sqrt{d_{model}}$.
        - `dropout_p`: probability of dropping an element of the result.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values of both tables.

        **Raises:**

        `ValueError` for sizes that are not positive, unknown `positions`, a `max_len`
        missing or without use, or a `dropout_p` outside [0, 1].
        """
        check_size("vocab_size", vocab_size)
        check_size("d_model", d_model)
        check_choice("positions", positions, ("none", "learned", "sinusoidal"))
        check_probability("dropout_p", dropout_p)
        if (positions == "learned") != (max_len is not None):
            raise ValueError(
                "`max_len` is the size of the table of learned positions: give it with "
                f'positions="learned" and only then; got max_len={max_len} and '
                f'positions="{positions}".'
            )
        table_key, learned_key = jax.random.split(key)
        self.table = Embedding(vocab_size, d_model, dtype, key=table_key)
        self.learned = (
            None
            if max_len is None
            else LearnedPositions(max_len, d_model, dtype, key=learned_key)
        )
        self.dropout = Dropout(dropout_p)
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.positions = positions
        self.scale = scale

    @property
    def weight(self) -> Float[Array, "vocab d_model"]:
        """The vectors of the ids, `(vocab_size, d_model)`."""
        return as_array(self.table.weight)

    @property
    def max_len(self) -> int | None:
        """Tokens of the longest document, `None` if any length will do."""
        return None if self.learned is None else self.learned.max_len

    @jax.named_scope("capibara_eqx.layers.TokenEmbedding")
    def __call__(
        self,
        tokens: Integer[Array, "*batch seq"],
        *,
        positions: Integer[Array, "*batch seq"] | None = None,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """**Arguments:**

        - `tokens`: ids in `[0, vocab_size)`, `(*batch, seq)`, of any integer dtype.
        - `positions`: of each token, same shape; by default they count the tokens of
            each document from 0.
        - `segment_ids`: document of each token, same shape; negative is padding, where
            tokens and positions may be anything.
        - `key`: for dropout.

        **Returns:**

        `(*batch, seq, d_model)`, in the dtype of the table.

        **Raises:**

        `ValueError` for arguments that do not fit, or active dropout without a key; at
        run time, under `jit` too, an error for an id outside the table or a position
        outside the learned ones.
        """
        self._check_tokens(tokens, segment_ids)
        if positions is not None:
            self._check_positions(positions, tokens.shape)
        elif segment_ids is None:
            self._check_length(tokens.shape[-1])
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        else:
            positions = segment_positions(segment_ids)
        x = self._embed(tokens, positions, segment_ids)
        return self.dropout(x, key=key)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> EmbeddingCache:
        """A cache that has seen nothing.

        **Arguments:**

        - `batch_shape`: batch axes of the tokens.
        - `max_len`: number of tokens that will be read; ignored, the cache has a fixed
            size.
        """
        del max_len
        length = jnp.zeros(batch_shape, jnp.int32)
        return EmbeddingCache(length, fresh_segment(batch_shape))

    @jax.named_scope("capibara_eqx.layers.TokenEmbedding.prefill")
    def prefill(
        self,
        tokens: Integer[Array, "*batch seq"],
        cache: EmbeddingCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], EmbeddingCache]:
        """Read one or more tokens, continuing from `cache`; there is no dropout.

        **Arguments:**

        - `tokens`: ids in `[0, vocab_size)`, `(*batch, seq)`.
        - `cache`: what was read before.
        - `segment_ids`: as in `__call__`. The first token continues the document that
            the cache ended in if it has the same id, or if there are no ids.

        **Returns:**

        `(*batch, seq, d_model)` and the cache after the last valid token.

        **Raises:**

        As `__call__`, and `ValueError` for a cache that does not fit.
        """
        self._check_tokens(tokens, segment_ids)
        expected = eqx.filter_eval_shape(self.init_cache, tokens.shape[:-1])
        check_cache("TokenEmbedding", cache, expected)
        if segment_ids is None:
            count = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
            positions = cache.length[..., None] + count.astype(cache.length.dtype)
            length = positions[..., -1] + 1
        else:
            before = cache.segment.astype(segment_ids.dtype)
            positions = segment_positions(segment_ids, before, cache.length)
            length = _length_after(positions, segment_ids, cache.length)
        x = self._embed(tokens, positions, segment_ids)
        segment = advance_segment(cache.segment, segment_ids)
        return x, EmbeddingCache(length, segment)

    @jax.named_scope("capibara_eqx.layers.TokenEmbedding.step")
    def step(
        self, token: Integer[Array, "*batch"], cache: EmbeddingCache
    ) -> tuple[Float[Array, "*batch d_model"], EmbeddingCache]:
        """Read one token of the document that `cache` ended in.

        **Arguments:**

        - `token`: ids in `[0, vocab_size)`, `(*batch,)`.
        - `cache`: what was read before.

        **Returns:**

        `(*batch, d_model)` and the new cache.

        **Raises:**

        As `prefill`.
        """
        x, cache = self.prefill(token[..., None], cache)
        return x[..., 0, :], cache

    def attend(
        self, x: Float[Array, "*batch d_model"]
    ) -> Float[Array, "*batch vocab_size"]:
        """Scores of every id for `x`, see `Embedding.attend`; without the scale."""
        return self.table.attend(x)

    def _check_tokens(self, tokens, segment_ids):
        check_ids("TokenEmbedding", "tokens", tokens)
        if tokens.ndim == 0 or tokens.shape[-1] == 0:
            raise ValueError(
                "TokenEmbedding: `tokens` must be a sequence (*batch, seq >= 1), got "
                f"shape {tokens.shape}. Pass a single token to `step`."
            )
        check_segment_ids("TokenEmbedding", segment_ids, tokens.shape)

    def _check_length(self, seq):
        """Where it is known at trace time, before the check at run time."""
        if self.max_len is not None and seq > self.max_len:
            raise ValueError(
                f"TokenEmbedding: `tokens` has {seq} positions, the layer learned "
                f"{self.max_len}. Build it with a greater `max_len`, or pass "
                "`segment_ids` if there are several documents."
            )

    def _check_positions(self, positions, shape):
        if self.positions == "none":
            raise ValueError(
                "TokenEmbedding: `positions` have no use in a layer built with "
                'positions="none". Build it with "learned" or "sinusoidal".'
            )
        check_ids("TokenEmbedding", "positions", positions)
        if positions.shape != shape:
            raise ValueError(
                "TokenEmbedding: `positions` must have the shape of `tokens`, "
                f"{shape}, got {positions.shape}."
            )

    def _embed(self, tokens, positions, segment_ids):
        if segment_ids is not None:
            # Whatever number marks padding need not be an id.
            valid = segment_ids >= 0
            tokens = jnp.where(valid, tokens, jnp.zeros_like(tokens))
            positions = jnp.where(valid, positions, jnp.zeros_like(positions))
        hint = "Build the layer with a `vocab_size` that holds every id."
        tokens = ids_in_range("TokenEmbedding", "tokens", tokens, self.vocab_size, hint)
        x = self.table(tokens)
        y = accumulate(x)
        if self.scale:
            y = y * math.sqrt(self.d_model)
        if self.learned is not None:
            y = y + self.learned(positions).astype(y.dtype)
        elif self.positions == "sinusoidal":
            y = y + sinusoidal_positions(positions, self.d_model, dtype=y.dtype)
        return zero_padding(y.astype(x.dtype), segment_ids)


def _length_after(positions, segment_ids, length):
    """Tokens of the last valid token's document so far; `length` if there is none."""
    seq = segment_ids.shape[-1]
    index = jnp.broadcast_to(jnp.arange(seq), segment_ids.shape)
    last = jnp.max(jnp.where(segment_ids >= 0, index, -1), axis=-1)
    at_last = jnp.take_along_axis(positions, jnp.maximum(last, 0)[..., None], axis=-1)
    return jnp.where(last >= 0, at_last[..., 0] + 1, length)
