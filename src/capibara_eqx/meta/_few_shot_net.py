"""What `MetaLA` is made of: an attention encoder and a linear head on its features."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import accumulate, split_or_none, zero_padding
from ..layers import MLP, Attention, Dropout, Linear, RMSNorm


class AttentionEncoder(eqx.Module):
    r"""A pre-norm residual around attention, then one around a feed-forward layer.

    $$h = x + \mathrm{dropout}(\mathrm{attention}(\mathrm{norm}(x))), \quad
    y = h + \mathrm{dropout}(\mathrm{MLP}(\mathrm{norm}(h)))$$

    Every token sees every other of its document; positions are rotary.
    """

    attention_norm: RMSNorm
    attention: Attention
    feed_forward_norm: RMSNorm
    feed_forward: MLP
    dropout: Dropout

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout_rate: float,
        dtype: DTypeLike | None,
        *,
        key: PRNGKeyArray,
    ):
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = RMSNorm(d_model, dtype=dtype)
        self.attention = Attention(
            d_model,
            n_heads,
            rope_enabled=True,
            is_causal=False,
            dtype=dtype,
            key=attention_key,
        )
        self.feed_forward_norm = RMSNorm(d_model, dtype=dtype)
        self.feed_forward = MLP(d_model, 4 * d_model, dtype=dtype, key=feed_forward_key)
        self.dropout = Dropout(dropout_rate)

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """The residual stream after both; zero at padding."""
        first_key, second_key = split_or_none(key, 2)
        x = zero_padding(x, segment_ids)
        y = self.attention(self.attention_norm(x), segment_ids=segment_ids)
        x = x + self.dropout(y, key=first_key)
        y = self.feed_forward(self.feed_forward_norm(x))
        return zero_padding(x + self.dropout(y, key=second_key), segment_ids)


class FewShotNet(eqx.Module):
    r"""An encoder, and a linear head on features of at most unit length.

    $$z = \mathrm{norm}(\mathrm{encoder}(x)) / \sqrt{d_{model}}, \qquad
    \hat y = W z + b$$

    The features of a step, or their mean over the sequence, have length 1 or less as
    long as the norm's weight is 1. So the curvature of the losses of `MetaLA` in $W$
    and $b$ is at most 2, whatever the width.
    """

    encoder: AttentionEncoder
    norm: RMSNorm
    head: Linear

    def features(
        self,
        x: Float[Array, "n seq d_model"],
        *,
        pooled: bool,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "n *seq d_model"]:
        """Of every step, or the mean over the steps, in float32 or wider."""
        z = accumulate(self.norm(self.encoder(x, key=key)))
        z = z / math.sqrt(z.shape[-1])
        return jnp.mean(z, axis=-2) if pooled else z

    def __call__(
        self,
        x: Float[Array, "n seq d_model"],
        *,
        pooled: bool,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "n *seq d_out"]:
        """Predictions of every step, or one for the sequence."""
        return self.head(self.features(x, pooled=pooled, key=key))
