import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from ._linear import Linear, uniform
from ._norm import RMSNorm
from ._router import Routing


class ProductKeys(eqx.Module):
    r"""A router whose score of an expert is a sum of the scores of two short keys.

    $$(q_1, q_2) = W_q x, \quad s_{(i, j)} = q_1 \cdot c_i + q_2 \cdot c'_j$$

    for the expert $i \sqrt{N} + j$. Lample et al., *Large Memory Layers with Product
    Keys*, arXiv 1907.05242. What is among the `top_k` best pairs has both its keys
    among the `top_k` best of their half: these are found among $2 \sqrt{N}$ scores, and
    the pairs among `top_k` times `top_k`, instead of among $N$.
    """

    query: Linear
    norm: RMSNorm | None
    keys: Float[Array, "{self.n_heads} 2 {self.num_keys} {self.d_key}"]
    n_heads: int = eqx.field(static=True)
    num_keys: int = eqx.field(static=True)
    d_key: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        n_heads: int,
        d_key: int,
        query_norm: bool,
        dtype: DTypeLike | None,
        *,
        key: PRNGKeyArray,
    ):
        query_key, keys_key = jax.random.split(key)
        width = 2 * d_key
        self.query = Linear(d_model, n_heads * width, False, dtype, key=query_key)
        self.norm = RMSNorm(width, dtype=dtype) if query_norm else None
        self.n_heads = n_heads
        self.num_keys = math.isqrt(num_experts)
        self.d_key = d_key
        shape = (n_heads, 2, self.num_keys, d_key)
        self.keys = uniform(keys_key, shape, d_key, dtype)

    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        top_k: int,
        mask: Bool[Array, "*batch"] | None,
    ) -> Routing:
        """Where tokens go; `x` is float32 or wider, and holds no NaN where masked."""
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            raise NotImplementedError(
                "product keys do not count choices of tokens that are sharded along an "
                "Explicit axis; call the layer inside `jax.shard_map`"
            )
        scores = self._scores(x)
        best, kept = jax.lax.top_k(
            jax.lax.stop_gradient(scores), min(top_k, self.num_keys)
        )
        pairs = best[..., 0, :, None] + best[..., 1, None, :]
        pairs = pairs.reshape(*pairs.shape[:-2], -1)
        places = jnp.divmod(jax.lax.top_k(pairs, top_k)[1], kept.shape[-1])
        halves = [
            jnp.take_along_axis(kept[..., half, :], place, axis=-1)
            for half, place in enumerate(places)
        ]
        chosen = [
            jnp.take_along_axis(scores[..., half, :], own, axis=-1)
            for half, own in enumerate(halves)
        ]
        weights = jax.nn.softmax(chosen[0] + chosen[1], axis=-1)
        indices = halves[0] * self.num_keys + halves[1]

        if mask is None:
            mask = jnp.ones(x.shape[:-1], jnp.bool_)
        # A choice by head, so that below heads count as tokens do.
        valid = jnp.broadcast_to(mask[..., None], (*mask.shape, self.n_heads))
        indices = jnp.where(valid[..., None], indices, -1)
        weights = jnp.where(valid[..., None], weights, jnp.zeros_like(weights))
        flat = (*mask.shape, self.n_heads * top_k)
        load, balance_loss, z_loss = self._losses(scores, indices, valid)
        return Routing(
            indices=indices.reshape(flat),
            weights=weights.reshape(flat),
            load=load,
            balance_loss=balance_loss,
            z_loss=z_loss,
            dropped=jnp.zeros((), jnp.int32),
        )

    def _scores(self, x):
        """Of every key, `(*batch, n_heads, 2, num_keys)`."""
        query = self.query(x).reshape(*x.shape[:-1], self.n_heads, 2 * self.d_key)
        if self.norm is not None:
            query = self.norm(query)
        query = query.reshape(*query.shape[:-1], 2, self.d_key)
        keys = self.keys.astype(query.dtype)
        return jnp.einsum("...hpd,hpnd->...hpn", query, keys)

    def _losses(self, scores, indices, valid):
        experts, top_k = self.num_keys**2, indices.shape[-1]
        tokens = tuple(range(valid.ndim))
        # Where there is no token at all, everything is zero.
        number = jnp.maximum(jnp.sum(valid), 1).astype(scores.dtype)
        # Counted one by one: a row of all experts for each choice would be too large.
        expert = jnp.where(indices < 0, experts, indices).reshape(-1)
        counts = jnp.zeros((experts,), jnp.int32).at[expert].add(1, mode="drop")
        load = counts.astype(scores.dtype) / (top_k * number)
        # A softmax over sums is the product of two, and so is its normaliser.
        shares = jax.nn.softmax(scores, axis=-1).reshape(-1, 2, self.num_keys)
        first = jnp.where(valid.reshape(-1, 1), shares[:, 0], 0)
        mean_shares = (first.T @ shares[:, 1]).reshape(-1) / number
        squares = jnp.square(jnp.sum(jax.nn.logsumexp(scores, axis=-1), axis=-1))
        z_loss = jnp.sum(squares, axis=tokens, where=valid) / number
        return load, experts * jnp.sum(load * mean_shares), z_loss
