import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    activate,
    check_positive,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation
from ._attention_base import joined, split_heads
from ._conv1d_block import Conv1DBlock, Conv1DCache
from ._head_width import head_width
from ._linear import Linear
from ._linear_attention import linear_attention
from ._norm import LayerNorm
from ._recurrent import AbstractRecurrent


class MetaLinearAttentionCache(eqx.Module):
    """The convolution's last inputs and the memory of each head."""

    conv: Conv1DCache
    state: Float[Array, "*batch n_heads v_head_dim head_dim"]


class MetaLinearAttention(AbstractRecurrent):
    r"""Linear attention without keys: what a memory forgets is what it takes in.

    $$x'_t = \mathrm{silu}(\mathrm{conv}(x)_t), \quad q = W_q x', \quad
    \alpha = \sigma(W_\alpha x')^{1 / \tau}, \quad v = W_v x', \quad
    g = \mathrm{silu}(W_g x' + b_g)$$

    $$S_t = S_{t-1} \mathrm{diag}(\alpha_t) + v_t (1 - \alpha_t)^\top, \quad
    o_t = S_t q_t + \sigma\big(\langle q_t, w \odot (1 - \alpha_t) \rangle\, v_t\big),
    \quad y_t = W_o (g_t \odot [\mathrm{norm}(o_t)]_\mathrm{heads})$$

    Chou et al., *MetaLA: Unified Optimal Linear Approximation to Softmax Attention
    Map*, arXiv 2411.10741: the decay $\alpha$ of each channel of the query stands in
    the place of a key as well, and the second term of $o$, the self-augmentation with
    the learned $w$, lets a token attend to itself more than the decay allows. Its
    sigmoid is of the product with $v$, the norm is a LayerNorm without parameters, and
    $\tau = 16$, $w = 0$ and small $W_q$, $W_\alpha$ at the start, as in the authors'
    program.

    This is the layer of that paper. The fast-adapting attention that this project calls
    `meta.MetaLA` is another thing: meta-learning attention.

    The memory is float32 or wider whatever the dtype of the input. `weight_decay_mask`
    leaves $w$ and the bias alone.

    !!! example

        ```python
        layer = MetaLinearAttention(64, 4, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"augmentation"})

    conv: Conv1DBlock
    q_proj: Linear
    decay_proj: Linear
    v_proj: Linear
    gate_proj: Linear
    augmentation: Float[Array, "{self.n_heads} {self.head_dim}"]
    norm: LayerNorm
    o_proj: Linear
    d_model: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    v_head_dim: int = eqx.field(static=True)
    temperature: float = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        d_conv: int = 4,
        temperature: float = 16.0,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `n_heads`: memories, each with queries, decays and values of its own.
        - `head_dim`: width of the queries and decays of a head; half of
            `d_model / n_heads` if not given.
        - `v_head_dim`: width of the values of a head; `d_model / n_heads` if not given.
        - `d_conv`: taps of the convolution, in tokens.
        - `temperature`: $\tau$; the greater, the longer is remembered.
        - `norm_eps`: added to the variance of the output of a head.
        - `chunk_size`: tokens that are read together; it changes speed and memory, not
            the result.
        - `implementation`: passed to `kernels.causal_conv`.
        - `dtype`: of the parameters.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes, a `temperature` or a `norm_eps` that are not positive,
        `n_heads` that do not divide `d_model`, or twice of which do not, without the
        widths of a head, or an unknown `implementation`.
        """
        for name, value in (("d_model", d_model), ("n_heads", n_heads)):
            check_size(name, value)
        head_dim = head_width(d_model, 2 * n_heads, "head_dim", head_dim)
        v_head_dim = head_width(d_model, n_heads, "v_head_dim", v_head_dim)
        check_size("d_conv", d_conv)
        check_positive("temperature", temperature)
        check_positive("norm_eps", norm_eps)
        if chunk_size is not None:
            check_size("chunk_size", chunk_size)
        check_implementation(implementation, "causal_conv")

        keys = jax.random.split(key, 6)
        inner, values = n_heads * head_dim, n_heads * v_head_dim
        self.conv = Conv1DBlock(
            d_model,
            d_model,
            d_conv,
            groups=d_model,
            use_bias=False,
            implementation=implementation,
            dtype=dtype,
            key=keys[0],
        )
        self.q_proj = _small(Linear(d_model, inner, False, dtype, key=keys[1]))
        self.decay_proj = _small(Linear(d_model, inner, False, dtype, key=keys[2]))
        self.v_proj = Linear(d_model, values, False, dtype, key=keys[3])
        self.gate_proj = Linear(d_model, values, True, dtype, key=keys[4])
        self.augmentation = jnp.zeros(
            (n_heads, head_dim), jnp.float32 if dtype is None else dtype
        )
        self.norm = LayerNorm(v_head_dim, norm_eps, False, False)
        self.o_proj = Linear(values, d_model, False, dtype, key=keys[5])
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.temperature = float(temperature)
        self.chunk_size = chunk_size

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> MetaLinearAttentionCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        shape = (*batch_shape, self.n_heads, self.v_head_dim, self.head_dim)
        state = jnp.zeros(shape, accumulator_dtype(self.augmentation.dtype))
        return MetaLinearAttentionCache(self.conv.init_cache(batch_shape), state)

    def _read(self, x, cache, segment_ids):
        reset = None
        if segment_ids is not None:
            before = cache.conv.segment.astype(segment_ids.dtype)
            reset = segment_starts(segment_ids, before)
        x = zero_padding(x, segment_ids)
        mixed, conv = self.conv.prefill(x, cache.conv, segment_ids=segment_ids)

        def heads(linear):
            return split_heads(accumulate(linear(mixed)), self.n_heads)

        q, v = heads(self.q_proj), heads(self.v_proj)
        log_decay = jax.nn.log_sigmoid(heads(self.decay_proj)) / self.temperature
        if segment_ids is not None:
            # Padding decays nothing, and so takes in nothing.
            valid = jnp.broadcast_to(segment_ids[..., None, None] >= 0, log_decay.shape)
            log_decay = jnp.where(valid, log_decay, 0.0)
        k = -jnp.expm1(log_decay)
        o, state = linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=cache.state,
            reset=reset,
            chunk_size=self.chunk_size,
        )
        w = jnp.broadcast_to(self.augmentation.astype(k.dtype), k.shape)
        itself = jnp.sum(q * w * k, axis=-1, keepdims=True)
        o = joined(self.norm(o + jax.nn.sigmoid(itself * v)))
        gate = activate("silu", accumulate(self.gate_proj(mixed)))
        y = self.o_proj((o * gate).astype(x.dtype))
        cache = MetaLinearAttentionCache(conv, state.astype(cache.state.dtype))
        return zero_padding(y, segment_ids), cache


def _small(linear: Linear) -> Linear:
    """With weights as the authors draw them, Glorot's times 2 to the -2.5."""
    limit = 2**-2.5 * math.sqrt(6 / (linear.in_features + linear.out_features))
    scale = limit * math.sqrt(linear.in_features)
    return eqx.tree_at(lambda m: m.weight, linear, linear.weight * scale)
