from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    activate,
    check_flag,
    check_positive,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation
from ._attention_base import joined, split_heads
from ._cache import advance_segment, fresh_segment
from ._conv1d_block import Conv1DBlock, Conv1DCache
from ._delta_rule import delta_rule
from ._head_width import head_width
from ._l2_norm import l2_normalize
from ._linear import Linear
from ._norm import RMSNorm
from ._recurrent import AbstractRecurrent
from ._step_size import step_bias


class DeltaNetCache(eqx.Module):
    """The convolution's last inputs, if there is one, and the memory of each head."""

    conv: Conv1DCache | None
    state: Float[Array, "*batch n_heads v_head_dim head_dim"]
    segment: Int[Array, "*batch"]


class DeltaNet(AbstractRecurrent):
    r"""A layer that learns as it reads: its memory is corrected token by token.

    $$q, k, v = \mathrm{silu}(\mathrm{conv}(W_q x, W_k x, W_v x)), \quad
    \hat q = \frac{q}{\sqrt{\lVert q \rVert^2 + \varepsilon}}, \quad
    \hat k = \frac{k}{\sqrt{\lVert k \rVert^2 + \varepsilon}}, \quad
    \beta = \sigma(W_\beta x)$$

    $$S_t = S_{t-1} + \beta_t (v_t - S_{t-1} \hat k_t)\, \hat k_t^\top, \qquad
    y_t = W_o\, [\mathrm{norm}(S_t \hat q_t)]_\mathrm{heads}$$

    One step of gradient descent a token and head, with the learned rate $\beta$, on
    what the memory $S$ recalls wrongly: Schlag et al., *Linear Transformers Are
    Secretly Fast Weight Programmers*, arXiv 2102.11174; with convolution, normalised
    keys and training in chunks Yang et al., *Parallelizing Linear Transformers with the
    Delta Rule over Sequence Length*, arXiv 2406.06484. See `delta_rule`.

    With `negative_eigenvalues` $\beta = 2 \sigma(W_\beta x)$, with which a memory can
    count modulo: Grazzi et al., arXiv 2411.12537. With `gated` the memory decays before
    each step by $e^{-\Delta A}$, $\Delta = \mathrm{softplus}(W_\Delta x + b_\Delta)$,
    $A = e^{A_{\log}}$, initialised as in `Mamba2`; with `output_gate` the norm of each
    head is multiplied by $\mathrm{silu}(W_g x)$. Both together are Gated DeltaNet: Yang
    et al., arXiv 2412.06464.

    The memory is float32 or wider whatever the dtype of the input. `weight_decay_mask`
    leaves $A_{\log}$, the norm and the biases alone.

    !!! example

        ```python
        layer = DeltaNet(64, 4, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "dt_bias"})

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    beta_proj: Linear
    dt_proj: Linear | None
    gate_proj: Linear | None
    conv: Conv1DBlock | None
    A_log: Float[Array, " {self.n_heads}"] | None
    dt_bias: Float[Array, " {self.n_heads}"] | None
    norm: RMSNorm
    o_proj: Linear
    d_model: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    v_head_dim: int = eqx.field(static=True)
    negative_eigenvalues: bool = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        use_short_conv: bool = True,
        d_conv: int = 4,
        conv_bias: bool = False,
        negative_eigenvalues: bool = False,
        gated: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `n_heads`: memories, each with queries, keys and values of its own.
        - `head_dim`: width of the queries and keys of a head; `d_model / n_heads` if
            not given.
        - `v_head_dim`: width of the values of a head; `head_dim` if not given.
        - `use_short_conv`: whether queries, keys and values are convolved over time.
        - `d_conv`: taps of the convolution, in tokens.
        - `conv_bias`: whether the convolution has one.
        - `negative_eigenvalues`: whether $\beta$ reaches up to 2 rather than 1.
        - `gated`: whether the memory decays.
        - `output_gate`: whether the output of a head is gated.
        - `norm_eps`: added to the mean square of the output of a head.
        - `chunk_size`: tokens that `delta_rule` multiplies together.
        - `implementation`: passed to `kernels.causal_conv`.
        - `dtype`: of the parameters; `A_log` and `dt_bias` are float32 or wider.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes or a `norm_eps` that are not positive, `n_heads` that do
        not divide `d_model` without a `head_dim`, or an unknown `implementation`.
        """
        for name, value in (("d_model", d_model), ("n_heads", n_heads)):
            check_size(name, value)
        head_dim = head_width(d_model, n_heads, "head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, value in (("v_head_dim", v_head_dim), ("d_conv", d_conv)):
            check_size(name, value)
        flags = {
            "use_short_conv": use_short_conv,
            "conv_bias": conv_bias,
            "negative_eigenvalues": negative_eigenvalues,
            "gated": gated,
            "output_gate": output_gate,
        }
        for name, flag in flags.items():
            check_flag(name, flag)
        check_positive("norm_eps", norm_eps)
        if chunk_size is not None:
            check_size("chunk_size", chunk_size)
        check_implementation(implementation, "causal_conv")

        keys = jax.random.split(key, 10)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)

        def linear(d_in, d_out, key):
            return Linear(d_in, d_out, False, dtype, key=key)

        self.q_proj = linear(d_model, n_heads * head_dim, keys[0])
        self.k_proj = linear(d_model, n_heads * head_dim, keys[1])
        self.v_proj = linear(d_model, n_heads * v_head_dim, keys[2])
        self.beta_proj = linear(d_model, n_heads, keys[3])
        self.o_proj = linear(n_heads * v_head_dim, d_model, keys[4])
        channels = n_heads * (2 * head_dim + v_head_dim)
        self.conv = None
        if use_short_conv:
            self.conv = Conv1DBlock(
                channels,
                channels,
                d_conv,
                groups=channels,
                use_bias=conv_bias,
                implementation=implementation,
                dtype=dtype,
                key=keys[5],
            )
        self.dt_proj, self.A_log, self.dt_bias = None, None, None
        if gated:
            self.dt_proj = linear(d_model, n_heads, keys[6])
            self.dt_bias = step_bias(n_heads, 1e-3, 0.1, 1e-4, wide, key=keys[7])
            rates = jax.random.uniform(keys[8], (n_heads,), wide, minval=1, maxval=16)
            self.A_log = jnp.log(rates)
        self.gate_proj = None
        self.norm = RMSNorm(v_head_dim, norm_eps, dtype=dtype)
        if output_gate:
            self.gate_proj = linear(d_model, n_heads * v_head_dim, keys[9])
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.negative_eigenvalues = negative_eigenvalues
        self.chunk_size = chunk_size

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> DeltaNetCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        shape = (*batch_shape, self.n_heads, self.v_head_dim, self.head_dim)
        state = jnp.zeros(shape, accumulator_dtype(self.o_proj.weight.dtype))
        conv = None if self.conv is None else self.conv.init_cache(batch_shape)
        return DeltaNetCache(conv, state, fresh_segment(batch_shape))

    def _read(self, x, cache, segment_ids):
        x = zero_padding(x, segment_ids)
        q, k, v, conv = self._mixed(x, cache.conv, segment_ids)
        reset = None
        if segment_ids is not None:
            before = cache.segment.astype(segment_ids.dtype)
            reset = segment_starts(segment_ids, before)
        o, state = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            accumulate(v),
            zero_padding(self._rates(x), segment_ids),
            log_decay=self._log_decay(x, segment_ids),
            initial_state=cache.state,
            reset=reset,
            chunk_size=self.chunk_size,
        )
        o = joined(self.norm(o))
        if self.gate_proj is not None:
            o = o * activate("silu", self.gate_proj(x).astype(o.dtype))
        y = zero_padding(self.o_proj(o.astype(x.dtype)), segment_ids)
        segment = advance_segment(cache.segment, segment_ids)
        return y, DeltaNetCache(conv, state.astype(cache.state.dtype), segment)

    def _mixed(self, x, conv, segment_ids):
        """Queries, keys and values of each head, and the cache of the convolution."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        mixed = jnp.concatenate(parts, axis=-1)
        if self.conv is None:
            mixed = activate("silu", mixed)
        else:
            mixed, conv = self.conv.prefill(mixed, conv, segment_ids=segment_ids)
        width = self.n_heads * self.head_dim
        parts = jnp.split(mixed, [width, 2 * width], axis=-1)
        q, k, v = (split_heads(part, self.n_heads) for part in parts)
        return q, k, v, conv

    def _rates(self, x):
        beta = jax.nn.sigmoid(accumulate(self.beta_proj(x)))
        return 2 * beta if self.negative_eigenvalues else beta

    def _log_decay(self, x, segment_ids):
        """In float32 or wider; padding decays nothing."""
        if self.dt_proj is None or self.dt_bias is None or self.A_log is None:
            return None
        dt = self.dt_proj(x)
        dt = dt.astype(accumulator_dtype(dt.dtype, self.dt_bias.dtype))
        bias = jnp.broadcast_to(self.dt_bias.astype(dt.dtype), dt.shape)
        dt = jax.nn.softplus(dt + bias)
        A = jnp.exp(accumulate(self.A_log)).astype(dt.dtype)
        return zero_padding(-dt * jnp.broadcast_to(A, dt.shape), segment_ids)
