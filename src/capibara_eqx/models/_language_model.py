from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Integer, PRNGKeyArray, PyTree

from ..internal import check_ids, check_segment_ids, check_size
from ..layers import Embedding, Linear, RMSNorm
from ._block import ResidualBlock
from ._stack import Stack


class ModelOutput(eqx.Module):
    """What a model computes: scores of the next token, and what its layers report."""

    logits: Float[Array, "*batch seq vocab"]
    aux: PyTree


class LanguageModel(eqx.Module):
    """Token ids in, scores of the next token out: embedding, blocks, norm, head.

    The blocks decide what it is: any sequence mixers, alike or mixed. `model(tokens)`
    gives logits for every position; `prefill` and `step` do the same from a cache.

    !!! example

        ```python
        key, *keys = jax.random.split(jax.random.key(0), 3)
        blocks = [ResidualBlock(Mamba(64, key=k), 64) for k in keys]
        model = LanguageModel(256, 64, blocks, key=key)
        logits = model(tokens)                         # (*batch, seq, 256)
        ```
    """

    embedding: Embedding
    stack: Stack
    norm: RMSNorm
    head: Linear | None
    vocab_size: int = eqx.field(static=True)
    d_model: int = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Sequence[ResidualBlock],
        *,
        scan: bool = False,
        remat: str | Callable[..., bool] | None = None,
        tie_embeddings: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `vocab_size`: number of token ids.
        - `d_model`: width of the residual stream, which all `blocks` keep.
        - `blocks`, `scan`, `remat`: see `Stack`.
        - `tie_embeddings`: whether the head is the embedding table.
        - `dtype`: of embedding, norm and head; float32 if not given.
        - `key`: for the initial values of embedding and head.

        **Raises:**

        `ValueError` for sizes that are not positive, and what `Stack` raises.
        """
        check_size("vocab_size", vocab_size)
        check_size("d_model", d_model)
        embedding_key, head_key = jax.random.split(key)
        self.embedding = Embedding(vocab_size, d_model, dtype, key=embedding_key)
        self.stack = Stack(blocks, scan=scan, remat=remat)
        self.norm = RMSNorm(d_model, dtype=dtype)
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
        x = self._embed(tokens, segment_ids)
        x, aux = self.stack(x, segment_ids=segment_ids, key=key)
        return ModelOutput(self._scores(x), aux)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> PyTree:
        """A cache that has seen nothing.

        **Arguments:**

        - `batch_shape`: batch axes of the tokens.
        - `max_len`: number of tokens that it must hold; recurrent layers ignore it.
        """
        return self.stack.init_cache(batch_shape, max_len=max_len)

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
        x = self._embed(tokens, segment_ids)
        x, cache = self.stack.prefill(x, cache, segment_ids=segment_ids)
        return self._scores(x), cache

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
        check_ids("LanguageModel.step", "token", token)
        x, cache = self.stack.step(self.embedding(token), cache)
        return self._scores(x), cache

    def _scores(self, x):
        x = self.norm(x)
        return self.embedding.attend(x) if self.head is None else self.head(x)

    def _embed(self, tokens, segment_ids):
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
        return self.embedding(tokens)
