import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Integer, PRNGKeyArray

from ..internal import check_size
from ._embedding import Embedding
from ._id_range import ids_in_range


class ByteEmbedding(eqx.Module):
    """Bytes to vectors: a table of 256, read from arrays of uint8, without tokenizer.

    Wang et al., *MambaByte: Token-free Selective State Space Model*, arXiv 2401.13660.
    Ids from 256 on are special ones, for begin, end or padding. For positions use
    `TokenEmbedding` with `embed.vocab_size` ids; `encode` and `decode` serve it too.

    !!! example

        ```python
        embed = ByteEmbedding(64, key=jax.random.key(0))
        ids = embed.encode("capibara")                 # (8,), uint8
        y = embed(jnp.asarray(ids))                    # (8, 64)
        logits = embed.attend(y)                       # (8, 256): a tied head
        text = embed.decode(ids).decode()              # "capibara"
        ```
    """

    table: Embedding
    d_model: int = eqx.field(static=True)
    num_special: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_special: int = 0,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: length of each vector.
        - `num_special`: number of ids after those of the bytes: 256, 257, and so on.
        - `dtype`: of the table; float32 if not given.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for a `d_model` that is not positive or a `num_special` that is
        not a number of ids.
        """
        check_size("d_model", d_model)
        if num_special != 0 or isinstance(num_special, bool | float):
            check_size("num_special", num_special)
        self.table = Embedding(256 + num_special, d_model, dtype, key=key)
        self.d_model = d_model
        self.num_special = num_special

    @property
    def vocab_size(self) -> int:
        """Number of ids, bytes and special ones."""
        return 256 + self.num_special

    @jax.named_scope("capibara_eqx.layers.ByteEmbedding")
    def __call__(
        self, tokens: Integer[Array, "*batch"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_model"]:
        """**Arguments:**

        - `tokens`: bytes or special ids, any shape, of any integer dtype.
        - `key`: ignored.

        **Returns:**

        `(*batch, d_model)`, in the dtype of the table.

        **Raises:**

        `ValueError` for ids that are not integers; at run time, under `jit` too, an
        error for an id outside.
        """
        del key
        hint = "Ids from 256 on need `num_special`."
        tokens = ids_in_range("ByteEmbedding", "tokens", tokens, self.vocab_size, hint)
        return self.table(tokens)

    def attend(
        self, x: Float[Array, "*batch d_model"]
    ) -> Float[Array, "*batch vocab_size"]:
        """Scores of every id for `x`, see `Embedding.attend`."""
        return self.table.attend(x)

    def encode(self, text: str | bytes) -> Integer[np.ndarray, " length"]:
        """The ids of a text.

        **Arguments:**

        - `text`: bytes, or a string, whose UTF-8 bytes are taken.

        **Returns:**

        A NumPy array, uint8; int32 if there are special ids, which would not fit.
        """
        data = text.encode() if isinstance(text, str) else text
        ids = np.frombuffer(data, np.uint8)
        return ids.astype(np.int32 if self.num_special else np.uint8)

    def decode(
        self, ids: Integer[Array, " length"] | Integer[np.ndarray, " length"]
    ) -> bytes:
        """The bytes of a sequence of ids; special ids stand for none.

        A model may write any bytes: `.decode(errors="replace")` makes text of them.

        **Arguments:**

        - `ids`: `(length,)`.

        **Returns:**

        `bytes`, at most `length` of them.

        **Raises:**

        `ValueError` for anything but a sequence of ids of this layer.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                "ByteEmbedding.decode: `ids` must be one sequence of integers, "
                f"(length,), got shape {array.shape} of {array.dtype}. Decode row by "
                "row."
            )
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"ByteEmbedding.decode: `ids` must lie between 0 and "
                f"{self.vocab_size - 1}, got {outside[0]}. Were they made by a layer "
                "with another `num_special`?"
            )
        return array[array < 256].astype(np.uint8).tobytes()
