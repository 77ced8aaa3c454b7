import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    check_choice,
    check_segment_ids,
    check_sequence,
    check_size,
    split_or_none,
    zero_padding,
)
from ._linear import Linear
from ._mixer import AbstractSequenceMixer, check_mixed, check_mixer


_MERGES = ("sum", "concatenation", "gate")


class Bidirectional(eqx.Module):
    r"""Two sequence mixers, of which one reads the row from its end.

    $$f = \mathrm{forward}(x), \quad r = \mathrm{reversed}(\mathrm{reverse}(
    \mathrm{reversed}(x)))$$

    $$y = f + r, \qquad y = W_o [f, r] + b_o, \qquad
    y = g \odot f + (1 - g) \odot r, \quad g = \sigma(W_g x + b_g)$$

    for `merge="sum"`, `"concatenation"` and `"gate"`. Schuster and Paliwal,
    *Bidirectional Recurrent Neural Networks*, IEEE Transactions on Signal Processing
    45, 1997. Every token sees its whole document, the ones behind it too, so that the
    layer cannot be streamed: it is for encoders, and has no cache.

    Documents of a packed row are read each on its own, in both directions; padding is
    left out by both and its output is zero.

    !!! example

        ```python
        k1, k2, k3 = jax.random.split(key, 3)
        layer = Bidirectional(Mamba(64, key=k1), Mamba(64, key=k2), 64, "gate", key=k3)
        y = layer(x)                                   # (*batch, seq, 64)
        ```
    """

    forward: AbstractSequenceMixer
    reverse: AbstractSequenceMixer
    out_proj: Linear | None
    gate: Linear | None
    d_model: int = eqx.field(static=True)

    def __init__(
        self,
        forward: AbstractSequenceMixer,
        reverse: AbstractSequenceMixer,
        d_model: int,
        merge: str = "sum",
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `forward`, `reverse`: from `d_model` to `d_model`, returning their output
            alone. One mixer given twice is two that start from equal parameters.
        - `d_model`: width of input and output.
        - `merge`: `"sum"`, `"concatenation"` or `"gate"`.
        - `dtype`: of the parameters made here; float32 if not given.
        - `key`: for their initial values; a sum has none.

        **Raises:**

        `ValueError` for a `d_model` that is not positive, an unknown `merge`, or a
        direction that is no mixer of this width.
        """
        check_size("d_model", d_model)
        check_choice("merge", merge, _MERGES)
        check_mixer("Bidirectional", "forward", forward, d_model)
        check_mixer("Bidirectional", "reverse", reverse, d_model)
        self.forward = forward
        self.reverse = reverse
        self.out_proj = self.gate = None
        if merge == "concatenation":
            self.out_proj = Linear(2 * d_model, d_model, dtype=dtype, key=key)
        if merge == "gate":
            self.gate = Linear(d_model, d_model, dtype=dtype, key=key)
        self.d_model = d_model

    @jax.named_scope("capibara_eqx.layers.Bidirectional")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """**Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `segment_ids`: document of each token, `(*batch, seq)`; negative is padding.
        - `key`: for mixers that draw random numbers.

        **Returns:**

        The same shape and dtype.

        **Raises:**

        `ValueError` for an input that does not fit, or a mixer that returns something
        else than its output.
        """
        check_sequence("Bidirectional", "x", x, self.d_model)
        check_segment_ids("Bidirectional", segment_ids, x.shape[:-1])
        forward_key, reverse_key = split_or_none(key, 2)
        x = zero_padding(x, segment_ids)
        f = self.forward(x, segment_ids=segment_ids, key=forward_key)
        ids = None if segment_ids is None else jnp.flip(segment_ids, axis=-1)
        r = self.reverse(jnp.flip(x, axis=-2), segment_ids=ids, key=reverse_key)
        f = check_mixed("Bidirectional", "forward", x, f)
        r = jnp.flip(check_mixed("Bidirectional", "reverse", x, r), axis=-2)
        if self.out_proj is not None:
            y = self.out_proj(jnp.concatenate([f, r], axis=-1))
            return zero_padding(y, segment_ids)
        if self.gate is None:
            return f + r
        g = jax.nn.sigmoid(accumulate(self.gate(x)))
        return (g * accumulate(f) + (1 - g) * accumulate(r)).astype(x.dtype)
