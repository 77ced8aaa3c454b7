from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Integer, PRNGKeyArray, PyTree

from ..internal import check_ids, check_segment_ids, check_size, split_or_none
from ..layers import Embedding, EmbeddingCache, Linear, RMSNorm, TokenEmbedding
from ._block import AbstractBlock
from ._stack import Stack


class ModelOutput(eqx.Module):
    """What a model computes: scores of the next token, and what its layers report."""

    logits: Float[Array, "*batch seq vocab"]
    aux: PyTree


class ModelCache(eqx.Module):
    """Where the embedding stands, and the caches of the blocks."""

    embedding: EmbeddingCache
    stack: PyTree


class LanguageModel(eqx.Module):
    """Token ids in, scores of the next token out: embedding, blocks, norm, head.

    The blocks decide what it is: any sequence mixers, alike or mixed, each with a cache
    of its own kind. `model(tokens)` gives logits for every position; `prefill` and
    `step` do the same from a cache.

    !!! example

        ```python
        key, *keys = jax.random.split(jax.random.key(0), 3)
        blocks = [ResidualBlock(Mamba(64, key=k), 64) for k in keys]
        model = LanguageModel(256, 64, blocks, key=key)
        logits = model(tokens)                         # (*batch, seq, 256)

        k1, k2, k3, k4 = jax.random.split(key, 4)
        attention = Attention(64, 8, rope_enabled=True, window=128, key=k1)
        hybrid = [
            ResidualBlock(Mamba(64, key=k2), 64),
            TransformerBlock(attention, SwiGLU(64, 176, key=k3), 64),
        ]
        model = LanguageModel(256, 64, hybrid, key=k4)
        ```
    """

    embedding: Embedding | TokenEmbedding
    stack: Stack
    norm: RMSNorm
    head: Linear | None
    vocab_size: int = eqx.field(static=True)
    d_model: int = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Sequence[AbstractBlock],
        *,
        scan: bool = False,
        remat: str | Callable[..., bool] | None = None,
        tie_embeddings: bool = True,
        embedding: TokenEmbedding | None = None,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `vocab_size`: number of token ids.
        - `d_model`: width of the residual stream, which all `blocks` keep.
        - `blocks`, `scan`, `remat`: see `Stack`.
        - `tie_embeddings`: whether the head is the embedding table.
        - `embedding`: in the place of a plain table, such as one with positions, for
            attention that has none of its own.
        - `eps`: of the norm in front of the head.
        - `dtype`: of embedding, norm and head; float32 if not given.
        - `key`: for the initial values of embedding and head.

        **Raises:**

        `ValueError` for sizes or an `eps` that are not positive, an `embedding` of
        other sizes, and what `Stack` raises.
        """
        check_size("vocab_size", vocab_size)
        check_size("d_model", d_model)
        embedding_key, head_key = jax.random.split(key)
        table = embedding
        if table is None:
            table = Embedding(vocab_size, d_model, dtype, key=embedding_key)
        elif (table.vocab_size, table.d_model) != (vocab_size, d_model):
            raise ValueError(
                f"`embedding` must have {vocab_size} ids of width {d_model}, as the "
                f"model, got {table.vocab_size} of width {table.d_model}."
            )
        self.embedding = table
        self.stack = Stack(blocks, scan=scan, remat=remat)
        self.norm = RMSNorm(d_model, eps, dtype=dtype)
        self.head = (
            None
            if tie_embeddings
            else Linear(d_model, vocab_size, use_bias=False, dtype=dtype, key=head_key)
        )
        self.vocab_size = vocab_size
        self.d_model = d_model

    def __call__(
        self,
        tokens: Integer[Array, "*batch seq"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq vocab"]:
        """Scores of the next token at every position.

        **Arguments:**

        - `tokens`: ids, `(*batch, seq)`.
        - `segment_ids`: document of each token, same shape; negative is padding, the
            scores there mean nothing.
        - `key`: for dropout and other random layers.

        **Returns:**

        `(*batch, seq, vocab_size)`.

        **Raises:**

        `ValueError` for tokens that are not a sequence, or active dropout without key.
        """
        return self.forward(tokens, segment_ids=segment_ids, key=key).logits

    @jax.named_scope("capibara_eqx.models.LanguageModel")
    def forward(
        self,
        tokens: Integer[Array, "*batch seq"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ModelOutput:
        """As `__call__`, with what the layers report.

        **Returns:**

        `ModelOutput(logits, aux)`; `aux` has no arrays where no layer reports any.
        """
        x, aux = self.features(tokens, segment_ids=segment_ids, key=key)
        return ModelOutput(self.scores(x), aux)

    def features(
        self,
        tokens: Integer[Array, "*batch seq"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], PyTree]:
        """What the head reads: the residual stream after the last norm.

        **Arguments:**

        As of `__call__`.

        **Returns:**

        `(x, aux)`: features `(*batch, seq, d_model)` and what the layers report.
        `scores(x)` are the logits.
        """
        tokens = _checked(tokens, segment_ids)
        if isinstance(self.embedding, TokenEmbedding):
            embedding_key, key = split_or_none(key, 2)
            x = self.embedding(tokens, segment_ids=segment_ids, key=embedding_key)
        else:
            x = self.embedding(tokens)
        x, aux = self.stack(x, segment_ids=segment_ids, key=key)
        return self.norm(x), aux

    def scores(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        """Scores of every token id for `features`, `(*batch, d_model)`."""
        return self.embedding.attend(x) if self.head is None else self.head(x)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> PyTree:
        """A cache that has seen nothing.

        **Arguments:**

        - `batch_shape`: batch axes of the tokens.
        - `max_len`: number of tokens that it must hold; recurrent layers ignore it.

        **Returns:**

        The caches of the blocks; with an `embedding` that has positions a `ModelCache`.
        """
        stack = self.stack.init_cache(batch_shape, max_len=max_len)
        if isinstance(self.embedding, TokenEmbedding):
            return ModelCache(self.embedding.init_cache(batch_shape), stack)
        return stack

    @jax.named_scope("capibara_eqx.models.LanguageModel.prefill")
    def prefill(
        self,
        tokens: Integer[Array, "*batch seq"],
        cache: PyTree,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq vocab"], PyTree]:
        """Read one or more tokens, continuing from `cache`.

        **Arguments:**

        - `tokens`: ids, `(*batch, seq)`.
        - `cache`: what was read before.
        - `segment_ids`: as in `__call__`; the first token continues the document that
            the cache ended in if it has the same id, or if there are no ids.

        **Returns:**

        Scores `(*batch, seq, vocab_size)` and the cache after the last valid token.

        **Raises:**

        `ValueError` for tokens or a cache that do not fit.
        """
        x, cache = self.prefill_features(tokens, cache, segment_ids=segment_ids)
        return self.scores(x), cache

    def prefill_features(
        self,
        tokens: Integer[Array, "*batch seq"],
        cache: PyTree,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], PyTree]:
        """As `prefill`, with `features` in the place of scores."""
        tokens = _checked(tokens, segment_ids)
        ids = segment_ids
        if isinstance(self.embedding, TokenEmbedding):
            cache = _of_model(cache)
            x, read = self.embedding.prefill(tokens, cache.embedding, segment_ids=ids)
            x, stack = self.stack.prefill(x, cache.stack, segment_ids=ids)
            return self.norm(x), ModelCache(read, stack)
        x, cache = self.stack.prefill(self.embedding(tokens), cache, segment_ids=ids)
        return self.norm(x), cache

    @jax.named_scope("capibara_eqx.models.LanguageModel.step")
    def step(
        self, token: Integer[Array, "*batch"], cache: PyTree
    ) -> tuple[Float[Array, "*batch vocab"], PyTree]:
        """Read one token.

        **Arguments:**

        - `token`: ids, `(*batch,)`.
        - `cache`: what was read before.

        **Returns:**

        Scores `(*batch, vocab_size)` and the new cache.

        **Raises:**

        `ValueError` for a cache that does not fit.
        """
        x, cache = self.step_features(token, cache)
        return self.scores(x), cache

    def step_features(
        self, token: Integer[Array, "*batch"], cache: PyTree
    ) -> tuple[Float[Array, "*batch d_model"], PyTree]:
        """As `step`, with `features` in the place of scores."""
        check_ids("LanguageModel.step", "token", token)
        if isinstance(self.embedding, TokenEmbedding):
            cache = _of_model(cache)
            x, read = self.embedding.step(token, cache.embedding)
            x, stack = self.stack.step(x, cache.stack)
            return self.norm(x), ModelCache(read, stack)
        x, cache = self.stack.step(self.embedding(token), cache)
        return self.norm(x), cache


def _checked(tokens, segment_ids):
    check_ids("LanguageModel", "tokens", tokens)
    if tokens.ndim < 1 or tokens.shape[-1] == 0:
        raise ValueError(
            "LanguageModel: `tokens` must be a sequence (*batch, seq >= 1), got "
            f"shape {tokens.shape}. Pass a single token to `step`."
        )
    check_segment_ids("LanguageModel", segment_ids, tokens.shape)
    if segment_ids is not None:
        # Whatever number marks padding need not be an id.
        tokens = jnp.where(segment_ids >= 0, tokens, jnp.zeros_like(tokens))
    return tokens


def _of_model(cache: PyTree) -> ModelCache:
    if not isinstance(cache, ModelCache):
        raise ValueError(
            f"LanguageModel: `cache` must be a ModelCache, got {type(cache).__name__}. "
            "Make it with this model's `init_cache`."
        )
    return cache
