from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_flag,
    check_last_axis,
    check_positive,
    check_range,
    check_segment_ids,
    check_sequence,
    check_size,
    segment_starts,
    zero_padding,
)
from ._activation import activate
from ._attention_base import check_heads, joined, split_heads
from ._cache import advance_segment, check_cache, fresh_segment
from ._l2_norm import l2_normalize
from ._linear import Linear
from ._mixer import AbstractSequenceMixer
from ._norm import LayerNorm
from ._ttt import FastWeights, start_fast_weights, ttt


# Standard deviation of the weights that a document starts with, as in the paper.
_DEVIATION = 0.02


class TTTCache(eqx.Module):
    """The fast weights in the middle of a mini-batch, with their bias as a last row."""

    fast: FastWeights
    segment: Int[Array, "*batch"]


class TTTLinear(AbstractSequenceMixer):
    r"""A layer whose state is a linear model that learns from the tokens it reads.

    Each head has a model $f(x; W, b) = x + \mathrm{LN}(W x + b)$ that is trained while
    the sequence is read, to tell one view of a token from another:

    $$\ell_t(W, b) = |f(k_t; W, b) - v_t|^2, \qquad
    W_t = W_s - c_{t-s} \sum_{r=s}^{t} \eta_r \nabla_W \ell_r(W_s, b_s), \qquad
    y_t = f(q_t; W_t, b_t)$$

    and the same for $b$, with $q, k, v$ linear in the input, $s$ the first token of the
    mini-batch of $t$, a rate $\eta_t = \eta_\text{base}\, \sigma(\theta x_t) / d$ for a
    head of width $d$, and $c_i = \max(1 / (i + 1) + \gamma_i, 0)$ with a learned
    $\gamma$. The start $W_0, b_0$ and the norm's parameters are learned by what trains
    the layer, through the steps. After them comes $W_o (\mathrm{LN}(y) \odot
    \mathrm{gelu}(W_g x))$. Sun et al., *Learning to (Learn at Test Time)*, arXiv
    2407.04620: TTT-Linear, in its dual form. $c$, the norm and the gate are those of
    the authors' program, which takes half of the loss, so that its base rate 1 is 0.5
    here.

    Left out are that program's rotary embedding of the places in a mini-batch and the
    convolutions that its Mamba backbone has in front of $q$ and $k$. The paper cuts a
    row into mini-batches; here one begins with every document, however rows are packed,
    and it may be left and taken up again by a cache.

    The fast weights are float32 or wider whatever the dtype of the input.
    `weight_decay_mask` leaves $\gamma$, $b_0$ and the norms alone.

    !!! example

        ```python
        layer = TTTLinear(64, 4, mini_batch_size=8, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"place_rate", "b0", "inner_weight", "inner_bias"}
    )

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    rate_proj: Linear
    place_rate: Float[Array, " {self.mini_batch_size}"]
    W0: Float[Array, "{self.n_heads} {self.head_dim} {self.head_dim}"]
    b0: Float[Array, "{self.n_heads} {self.head_dim}"]
    inner_weight: Float[Array, "{self.n_heads} {self.head_dim}"]
    inner_bias: Float[Array, "{self.n_heads} {self.head_dim}"]
    norm: LayerNorm | None
    gate_proj: Linear | None
    o_proj: Linear
    d_model: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    mini_batch_size: int = eqx.field(static=True)
    inner_rate: float = eqx.field(static=True)
    qk_norm: bool = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        mini_batch_size: int = 16,
        inner_rate: float = 0.5,
        qk_norm: bool = False,
        output_norm: bool = True,
        gate: bool = True,
        norm_eps: float = 1e-6,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `n_heads`: models, each of `d_model / n_heads` channels.
        - `mini_batch_size`: tokens whose gradients are taken at the same weights.
            Smaller learns faster from a token, larger is more parallel.
        - `inner_rate`: $\eta_\text{base}$.
        - `qk_norm`: whether queries and keys are brought to length one, which the paper
            does not do.
        - `output_norm`: whether a norm of all heads stands behind them.
        - `gate`: whether a gate does.
        - `norm_eps`: of both norms, added to variances.
        - `dtype`: of the parameters; what the models start with and their norms are
            float32 or wider.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes, an `inner_rate` or a `norm_eps` that are not positive,
        flags that are not True or False, or heads that do not divide the channels.
        """
        check_heads(n_heads, None, {"d_model": d_model})
        head_dim = d_model // n_heads
        check_size("mini_batch_size", mini_batch_size)
        check_range("inner_rate", inner_rate, above=0)
        check_positive("norm_eps", norm_eps)
        check_flag("qk_norm", qk_norm)
        check_flag("output_norm", output_norm)
        check_flag("gate", gate)
        keys = jax.random.split(key, 7)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        shape = (n_heads, head_dim)
        self.q_proj = Linear(d_model, d_model, False, dtype, key=keys[0])
        self.k_proj = Linear(d_model, d_model, False, dtype, key=keys[1])
        self.v_proj = Linear(d_model, d_model, False, dtype, key=keys[2])
        self.rate_proj = Linear(d_model, n_heads, True, dtype, key=keys[3])
        self.place_rate = jnp.zeros((mini_batch_size,), wide)
        normal = jax.random.normal(keys[4], (*shape, head_dim), wide)
        self.W0 = _DEVIATION * normal
        self.b0 = jnp.zeros(shape, wide)
        self.inner_weight = jnp.ones(shape, wide)
        self.inner_bias = jnp.zeros(shape, wide)
        self.norm = LayerNorm(d_model, norm_eps, dtype=dtype) if output_norm else None
        self.gate_proj = None
        if gate:
            self.gate_proj = Linear(d_model, d_model, False, dtype, key=keys[5])
        self.o_proj = Linear(d_model, d_model, False, dtype, key=keys[6])
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.mini_batch_size = mini_batch_size
        self.inner_rate = float(inner_rate)
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps

    @jax.named_scope("capibara_eqx.layers.TTTLinear")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`; `key` is ignored.

        **Raises:**

        `ValueError` for an input that does not fit.
        """
        del key
        check_sequence("TTTLinear", "x", x, self.d_model)
        return self._read(x, None, fresh_segment(x.shape[:-2]), segment_ids)[0]

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> TTTCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        fast = start_fast_weights(self._start(), batch_shape)
        return TTTCache(fast, fresh_segment(batch_shape))

    @jax.named_scope("capibara_eqx.layers.TTTLinear.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: TTTCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], TTTCache]:
        """See `AbstractSequenceMixer.prefill`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_sequence("TTTLinear", "x", x, self.d_model)
        expected = eqx.filter_eval_shape(self.init_cache, x.shape[:-2])
        check_cache("TTTLinear", cache, expected)
        y, fast = self._read(x, cache.fast, cache.segment, segment_ids)
        fast = jax.tree.map(lambda v, w: v.astype(w.dtype), fast, cache.fast)
        return y, TTTCache(fast, advance_segment(cache.segment, segment_ids))

    @jax.named_scope("capibara_eqx.layers.TTTLinear.step")
    def step(
        self, x: Float[Array, "*batch d_model"], cache: TTTCache
    ) -> tuple[Float[Array, "*batch d_model"], TTTCache]:
        """See `AbstractSequenceMixer.step`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_last_axis("TTTLinear.step", "x", x, self.d_model)
        y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache

    def _read(self, x, state, segment, segment_ids):
        check_segment_ids("TTTLinear", segment_ids, x.shape[:-1])
        x = zero_padding(x, segment_ids)
        q, k, v = (
            accumulate(split_heads(proj(x), self.n_heads))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = l2_normalize(q), l2_normalize(k)
        valid = restart = None
        if segment_ids is not None:
            valid = segment_ids >= 0
            restart = segment_starts(segment_ids, segment.astype(segment_ids.dtype))
        rate = jax.nn.sigmoid(accumulate(self.rate_proj(x)))
        told, state = ttt(
            _with_one(q),
            _with_one(k),
            v - k,
            rate * (self.inner_rate / self.head_dim),
            self._schedule(),
            self._start(),
            self._inner_norm,
            state=state,
            valid=valid,
            restart=restart,
        )
        y = joined(q.astype(told.dtype) + self._inner_norm(told)).astype(x.dtype)
        if self.norm is not None:
            y = self.norm(y)
        if self.gate_proj is not None:
            y = y * activate("gelu", self.gate_proj(x))
        return zero_padding(self.o_proj(y), segment_ids), state

    def _start(self) -> Float[Array, "n_heads d_in d_out"]:
        """What a document starts with, so that it takes inputs that end with a one."""
        W0, b0 = accumulate(self.W0), accumulate(self.b0)
        return jnp.concatenate([jnp.swapaxes(W0, -1, -2), b0[:, None]], axis=1)

    def _schedule(self) -> Float[Array, " mini_batch_size"]:
        place_rate = accumulate(self.place_rate)
        place = jnp.arange(1, self.mini_batch_size + 1, dtype=place_rate.dtype)
        return jnp.maximum(1 / place + place_rate, 0)

    def _inner_norm(self, y):
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.norm_eps)
        weight = jnp.broadcast_to(self.inner_weight.astype(y.dtype), y.shape)
        return y * weight + jnp.broadcast_to(self.inner_bias.astype(y.dtype), y.shape)


def _with_one(x) -> Float[Array, "*batch n_heads d_in"]:
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
