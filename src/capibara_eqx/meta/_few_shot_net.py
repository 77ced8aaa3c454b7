"""What `MetaLA` is made of: an attention encoder and a linear head on its features."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
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


class AdaptedParams(eqx.Module):
    """What `MetaLA` learned of a support set.

    - `weights`: like `MetaLA.meta_weights`.
    - `pooled`: whether there was one target for a whole sequence, so that there is one
        prediction as well.

    !!! example

        ```python
        layer = MetaLA(64, 8, 10, dropout_rate=0.0, key=jax.random.key(0))
        labels = jnp.array([3, 7])
        params = layer.adapt_parameters(layer.meta_weights, x, labels)
        params.weights.head.weight, params.pooled      # (10, 64), True
        ```
    """

    weights: FewShotNet
    pooled: bool = eqx.field(static=True)


def arrays_like(net: FewShotNet, weights: FewShotNet) -> FewShotNet:
    """The leaves of `net` where `weights` has one."""
    return jax.tree.map(
        lambda weight, leaf: None if weight is None else leaf,
        weights,
        net,
        is_leaf=lambda node: node is None,
    )


def check_like(
    argument: str, weights: FewShotNet, wanted: FewShotNet, method: str
) -> None:
    """Raise `ValueError` unless `weights` has the names and shapes of `wanted`."""
    found, expected = _shapes(weights), _shapes(wanted)
    if found != expected:
        wrong = [
            f"{name!r} {found.get(name, 'missing')} for {expected.get(name, 'none')}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        raise ValueError(
            f"MetaLA: `{argument}` must be arrays like the layer's `meta_weights`, of "
            f"method={method!r}; of other shapes are {', '.join(wrong)}. Take them of "
            "this layer."
        )


def _shapes(weights: FewShotNet) -> dict[str, tuple[int, ...]]:
    return {
        jtu.keystr(path, simple=True, separator="/"): jnp.shape(leaf)
        for path, leaf in jtu.tree_leaves_with_path(weights)
    }
