import math

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import check_positive, check_probability, check_size
from ..kernels import check_implementation
from ._attention_base import AbstractAttention, check_heads, split_heads
from ._attention_mode import AttentionMode
from ._bitnet import BitNet158
from ._dropout import Dropout
from ._linear import Linear
from ._norm import RMSNorm
from ._rotary import RopeScaling, check_rotary, rotary, rotary_frequencies


class Attention(AbstractAttention):
    r"""Multi-head and grouped-query attention, causal by default.

    $$y = W_o \,[\mathrm{attend}(W_q x, W_k x, W_v x)]_\mathrm{heads}$$

    Each key and value head serves `n_heads / n_kv_heads` query heads, so that the cache
    is so many times smaller. Vaswani et al., *Attention Is All You Need*, arXiv
    1706.03762; Ainslie et al., *GQA: Training Generalized Multi-Query Transformer
    Models from Multi-Head Checkpoints*, arXiv 2305.13245. Positions are rotary (arXiv
    2104.09864) and count from a document's start. With `qk_norm` the queries and keys
    of every head are normalised first (Dehghani et al., arXiv 2302.05442). A
    `BitNet158` in the place of `o_proj` brings the norm that BitNet has there.

    A cache holds `max_len` tokens and a runtime error is raised when it is full; with
    `window` it is a ring of so many tokens and never full. It has the dtype of the
    parameters. Softmax in float32 or wider.

    !!! example

        ```python
        layer = Attention(64, 8, n_kv_heads=2, rope_enabled=True, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,), max_len=256))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear | BitNet158
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    dropout: Dropout
    d_model: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope_enabled: bool = eqx.field(static=True)
    rope_base: float = eqx.field(static=True)
    rope_scaling: RopeScaling | None = eqx.field(static=True)
    is_causal: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_enabled: bool = False,
        rope_base: float = 10000.0,
        is_causal: bool = True,
        dropout_p: float = 0.0,
        window: int | None = None,
        qk_norm: bool = False,
        use_bias: bool = False,
        use_out_bias: bool | None = None,
        eps: float = 1e-5,
        rope_scaling: RopeScaling | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of input and output.
        - `n_heads`: number of query heads.
        - `n_kv_heads`: number of key and value heads, a divisor of `n_heads`; as many
            if not given.
        - `head_dim`: width of a head; `d_model / n_heads` if not given.
        - `rope_enabled`, `rope_base`, `rope_scaling`: see `rotary`; every layer has its
            own.
        - `is_causal`: whether a token sees no later one. One that is not has no cache.
        - `dropout_p`: probability of dropping a softmax weight.
        - `window`: a token sees those less than so many positions away, itself
            included.
        - `qk_norm`: whether queries and keys are normalised, a head at a time.
        - `use_bias`: whether the four maps have biases.
        - `use_out_bias`: whether the last one has; as `use_bias` if not given.
        - `eps`: of the norms.
        - `implementation`: passed to `kernels.attention`.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes that are not positive or cannot be divided, an odd
        `head_dim` with rotary positions, a `dropout_p` outside [0, 1], or an unknown
        `implementation`.
        """
        check_size("d_model", d_model)
        whole = {} if head_dim is not None else {"d_model": d_model}
        n_kv_heads = check_heads(n_heads, n_kv_heads, whole)
        head_dim = d_model // n_heads if head_dim is None else head_dim
        check_size("head_dim", head_dim)
        check_probability("dropout_p", dropout_p)
        check_implementation(implementation, "attention")
        check_positive("rope_base", rope_base)
        check_positive("eps", eps)
        if window is not None:
            check_size("window", window)
        if rope_enabled:
            check_rotary("head_dim", head_dim)
            rotary_frequencies(head_dim, rope_base, rope_scaling)
        use_out_bias = use_bias if use_out_bias is None else use_out_bias
        keys = jax.random.split(key, 4)
        inner, kv_inner = n_heads * head_dim, n_kv_heads * head_dim
        self.q_proj = Linear(d_model, inner, use_bias, dtype, key=keys[0])
        self.k_proj = Linear(d_model, kv_inner, use_bias, dtype, key=keys[1])
        self.v_proj = Linear(d_model, kv_inner, use_bias, dtype, key=keys[2])
        self.o_proj = Linear(inner, d_model, use_out_bias, dtype, key=keys[3])
        self.q_norm = RMSNorm(head_dim, eps, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps, dtype=dtype) if qk_norm else None
        self.dropout = Dropout(dropout_p)
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.rope_enabled = rope_enabled
        self.rope_base = rope_base
        self.rope_scaling = rope_scaling
        self.is_causal = is_causal
        self.window = window
        self.implementation = implementation

    @property
    def mode(self) -> AttentionMode:
        """`AttentionMode.GQA` if heads share keys, else `AttentionMode.STANDARD`."""
        shared = self.n_kv_heads < self.n_heads
        return AttentionMode.GQA if shared else AttentionMode.STANDARD

    @property
    def scale(self) -> float:
        """One over the root of `head_dim`."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """`(n_kv_heads, head_dim)`, twice."""
        shape = (self.n_kv_heads, self.head_dim)
        return shape, shape

    def heads(
        self,
        x: Float[Array, "*batch seq d_model"],
        positions: Int[Array, "*batch seq"],
    ) -> tuple[
        Float[Array, "*batch seq heads d"],
        Float[Array, "*batch seq kv_heads d"],
        Float[Array, "*batch seq kv_heads d"],
    ]:
        """Queries, keys and values of tokens at `positions`."""
        q = split_heads(self.q_proj(x), self.n_heads)
        k = split_heads(self.k_proj(x), self.n_kv_heads)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_enabled:
            q, k = (
                rotary(x, positions, self.rope_base, self.rope_scaling) for x in (q, k)
            )
        return q, k, v
