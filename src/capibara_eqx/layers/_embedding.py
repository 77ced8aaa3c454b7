import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Integer, PRNGKeyArray

from ..arrays import apply_weight
from ..internal import check_ids, check_last_axis, check_size


class Embedding(eqx.Module):
    """A table of one vector for each token id.

    Field names and weight layout are those of `equinox.nn.Embedding`; any number of
    axes of ids is allowed.

    !!! example

        ```python
        table = Embedding(256, 64, key=jax.random.key(0))
        x = table(tokens)                              # (*batch,) -> (*batch, 64)
        logits = table.attend(x)                       # (*batch, 256): a tied head
        ```
    """

    weight: Float[Array, "{self.num_embeddings} {self.embedding_size}"]
    num_embeddings: int = eqx.field(static=True)
    embedding_size: int = eqx.field(static=True)

    def __init__(
        self,
        num_embeddings: int,
        embedding_size: int,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `num_embeddings`: number of ids.
        - `embedding_size`: length of each vector.
        - `dtype`: of the table; float32 if not given.
        - `key`: for the initial values, normal with standard deviation 0.02.

        **Raises:**

        `ValueError` for a size that is not positive.
        """
        check_size("num_embeddings", num_embeddings)
        check_size("embedding_size", embedding_size)
        shape = (num_embeddings, embedding_size)
        dtype = jnp.float32 if dtype is None else dtype
        self.weight = 0.02 * jax.random.normal(key, shape, dtype)
        self.num_embeddings = num_embeddings
        self.embedding_size = embedding_size

    @jax.named_scope("capibara_eqx.layers.Embedding")
    def __call__(
        self, tokens: Integer[Array, "*batch"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch embedding_size"]:
        """**Arguments:**

        - `tokens`: ids in `[0, num_embeddings)`, any shape. An id outside gives NaN
            rather than another token's vector.
        - `key`: ignored.

        **Returns:**

        `(*batch, embedding_size)`, in the dtype of the table.

        **Raises:**

        `ValueError` for ids that are not integers.
        """
        del key
        check_ids("Embedding", "tokens", tokens)
        tokens = tokens.astype(jnp.int32)
        inside = (tokens >= 0) & (tokens < self.num_embeddings)
        rows = self.weight[jnp.where(inside, tokens, 0)]
        return jnp.where(inside[..., None], rows, jnp.asarray(jnp.nan, rows.dtype))

    def attend(
        self, x: Float[Array, "*batch embedding_size"]
    ) -> Float[Array, "*batch num_embeddings"]:
        """Scores of every id for `x`: the table used as an output layer.

        Press and Wolf, *Using the Output Embedding to Improve Language Models*, arXiv
        1608.05859.

        **Arguments:**

        - `x`: `(*batch, embedding_size)`.

        **Returns:**

        `(*batch, num_embeddings)`, in the dtype of `x`.

        **Raises:**

        `ValueError` if the last axis of `x` is not `embedding_size` long.
        """
        check_last_axis("Embedding.attend", "x", x, self.embedding_size)
        return apply_weight(self.weight, x)
