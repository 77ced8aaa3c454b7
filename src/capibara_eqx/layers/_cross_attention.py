import math

import equinox as eqx
import jax
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from ..internal import check_probability, check_sequence, check_size
from ..kernels import attention, check_implementation
from ._attention_base import check_heads, dropping, joined, split_heads
from ._dropout import Dropout
from ._linear import Linear
from ._norm import RMSNorm


class CrossAttention(eqx.Module):
    r"""Attention of one sequence to another.

    $$y = W_o \,[\mathrm{attend}(W_q x, W_k c, W_v c)]_\mathrm{heads}$$

    Every token of `x` sees all of the context $c$, but for what `mask` hides; one that
    sees nothing gets zeros in front of the output map. Vaswani et al., *Attention Is
    All You Need*, arXiv 1706.03762.

    !!! example

        ```python
        layer = CrossAttention(64, 8, d_context=32, key=jax.random.key(0))
        context = jnp.ones((2, 7, 32))                 # (*batch, context, 32)
        y = layer(x, context)                          # (*batch, seq, 64)
        ```
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    dropout: Dropout
    d_model: int = eqx.field(static=True)
    d_context: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_context: int | None = None,
        dropout_p: float = 0.0,
        qk_norm: bool = False,
        use_bias: bool = False,
        eps: float = 1e-5,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of `x` and of the output.
        - `d_context`: width of the context; `d_model` if not given.
        - the others: as of `Attention`.

        **Raises:**

        `ValueError` for sizes that are not positive or cannot be divided, a
        `dropout_p` outside [0, 1], or an unknown `implementation`.
        """
        check_size("d_model", d_model)
        whole = {} if head_dim is not None else {"d_model": d_model}
        n_kv_heads = check_heads(n_heads, n_kv_heads, whole)
        head_dim = d_model // n_heads if head_dim is None else head_dim
        check_size("head_dim", head_dim)
        d_context = d_model if d_context is None else d_context
        check_size("d_context", d_context)
        check_probability("dropout_p", dropout_p)
        check_implementation(implementation, "attention")
        keys = jax.random.split(key, 4)
        inner, kv_inner = n_heads * head_dim, n_kv_heads * head_dim
        self.q_proj = Linear(d_model, inner, use_bias, dtype, key=keys[0])
        self.k_proj = Linear(d_context, kv_inner, use_bias, dtype, key=keys[1])
        self.v_proj = Linear(d_context, kv_inner, use_bias, dtype, key=keys[2])
        self.o_proj = Linear(inner, d_model, use_bias, dtype, key=keys[3])
        self.q_norm = RMSNorm(head_dim, eps, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps, dtype=dtype) if qk_norm else None
        self.dropout = Dropout(dropout_p)
        self.d_model = d_model
        self.d_context = d_context
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        self.implementation = implementation

    @jax.named_scope("capibara_eqx.layers.CrossAttention")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        context: Float[Array, "*batch context d_context"],
        *,
        mask: Bool[Array, "*batch #seq #context"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """**Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `context`: `(*batch, context, d_context)`.
        - `mask`: true where a token may see one of the context, `(*batch, seq,
            context)`; either may be of size one, as in a mask of padding.
        - `key`: for dropout.

        **Returns:**

        `(*batch, seq, d_model)`, in the dtype of `x`.

        **Raises:**

        `ValueError` for inputs that do not fit, or active dropout without a key.
        """
        name = "CrossAttention"
        check_sequence(name, "x", x, self.d_model)
        check_sequence(name, "context", context, self.d_context)
        if x.shape[:-2] != context.shape[:-2]:
            raise ValueError(
                f"{name}: `x` and `context` must have the same batch axes, got shapes "
                f"{x.shape} and {context.shape}. Broadcast one to the other."
            )
        check_mask(name, mask, (*x.shape[:-1], context.shape[-2]))
        q = split_heads(self.q_proj(x), self.n_heads)
        k = split_heads(self.k_proj(context), self.n_kv_heads)
        v = split_heads(self.v_proj(context), self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[..., None, :, :],
            scale=1 / math.sqrt(self.head_dim),
            implementation=self.implementation,
            **dropping(name, self.dropout, key),
        )
        return self.o_proj(joined(y).astype(x.dtype))


class SelfAttention(eqx.Module):
    """Plain multi-head attention of a sequence to itself, with an optional mask.

    Every token sees every other; for causal attention that streams see `Attention`.
    Without a mask it is equivariant to the order of the tokens. Vaswani et al.,
    *Attention Is All You Need*, arXiv 1706.03762.

    !!! example

        ```python
        layer = eqx.nn.inference_mode(SelfAttention(64, 8, key=jax.random.key(0)))
        valid = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
        y = layer(x, mask=valid[:, None, :])           # x: (2, 5, 64)
        ```
    """

    attention: CrossAttention
    d_model: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int = 768,
        n_heads: int = 12,
        dropout_p: float = 0.1,
        use_bias: bool = True,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        As of `Attention`.

        **Raises:**

        `ValueError` if `n_heads` does not divide `d_model`, or a `dropout_p` outside
        [0, 1].
        """
        self.attention = CrossAttention(
            d_model,
            n_heads,
            dropout_p=dropout_p,
            use_bias=use_bias,
            implementation=implementation,
            dtype=dtype,
            key=key,
        )
        self.d_model = d_model

    @jax.named_scope("capibara_eqx.layers.SelfAttention")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        mask: Bool[Array, "*batch #seq #seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """**Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `mask`: true where a token may see another, `(*batch, seq, seq)`; either may
            be of size one, as in a mask of padding.
        - `key`: for dropout.

        **Returns:**

        `(*batch, seq, d_model)`, in the dtype of `x`.

        **Raises:**

        `ValueError` for inputs that do not fit, or active dropout without a key.
        """
        check_sequence("SelfAttention", "x", x, self.d_model)
        check_mask("SelfAttention", mask, (*x.shape[:-1], x.shape[-2]))
        return self.attention(x, x, mask=mask, key=key)


def check_mask(layer: str, mask, full: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `mask` is boolean and fits `(*batch, seq, context)`."""
    if mask is None:
        return
    *batch, seq, context = full
    fits = (
        mask.ndim == len(full)
        and mask.shape[:-2] == tuple(batch)
        and mask.shape[-2] in (1, seq)
        and mask.shape[-1] in (1, context)
    )
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"{layer}: `mask` must be boolean, {full}, the last two possibly 1; got "
            f"{mask.dtype} {mask.shape}. A mask of padding (*batch, context) is passed "
            "as `valid[..., None, :]`."
        )
