import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import accumulate, check_positive, check_probability, check_size
from ..kernels import check_implementation
from ._attention_base import AbstractAttention, check_heads, split_heads
from ._attention_mode import AttentionMode
from ._dropout import Dropout
from ._linear import Linear
from ._rotary import RopeScaling, check_rotary, rotary, rotary_frequencies


class DecoupledAttention(AbstractAttention):
    r"""Attention whose scores come from content and from position apart.

    $$s_{ij} = \frac{q^\mathrm{sem}_i \cdot k^\mathrm{sem}_j}{\sqrt{d_\mathrm{sem}}} +
    \frac{R q^\mathrm{geo}_i \cdot R k^\mathrm{geo}_j}{\sqrt{d_\mathrm{geo}}}$$

    with rotary embedding $R$ in the geometric path only, and widths a head. The paths
    are narrow, so the cache is: `sem_dim + geo_dim + v_dim` numbers a token if all
    heads have their own keys. This trades quality for memory: the reports on it, all
    of one author and unpublished, find it somewhat worse than attention of full width
    on most data. The separation is that of He et al., *DeBERTa*, arXiv 2006.03654, and
    of the decoupled rotary keys of DeepSeek-AI, *DeepSeek-V2*, arXiv 2405.04434.

    With `decoupled_gate` each head weighs the paths by $2g$ and $2 - 2g$, $g =
    \sigma(\gamma)$, which are one at initialisation. The whole equals one attention
    over the concatenated heads, and is computed so.

    !!! example

        ```python
        layer = DecoupledAttention(64, 8, sem_dim=16, geo_dim=32, key=key)
        y = layer(x)                                   # (*batch, seq, 64)
        ```
    """

    q_sem: Linear
    k_sem: Linear
    q_geo: Linear
    k_geo: Linear
    v_proj: Linear
    o_proj: Linear
    gate: Float[Array, " {self.n_heads}"] | None
    dropout: Dropout
    d_model: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)
    sem_dim: int = eqx.field(static=True)
    geo_dim: int = eqx.field(static=True)
    v_dim: int = eqx.field(static=True)
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
        sem_dim: int = 128,
        geo_dim: int = 256,
        v_dim: int | None = None,
        decoupled_gate: bool = False,
        rope_enabled: bool = True,
        rope_base: float = 10000.0,
        is_causal: bool = True,
        dropout_p: float = 0.0,
        window: int | None = None,
        use_bias: bool = False,
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
            if not given. The cache is smaller by their quotient.
        - `sem_dim`, `geo_dim`: widths of the semantic and of the geometric queries,
            all heads together.
        - `v_dim`: width of the values of as many heads; `sem_dim + geo_dim` if not
            given.
        - `decoupled_gate`: whether heads weigh the two paths by a learned gate.
        - `rope_enabled`, `rope_base`, `rope_scaling`: of the geometric path, see
            `rotary`.
        - `is_causal`, `dropout_p`, `window`, `use_bias`, `implementation`, `dtype`: as
            of `Attention`.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes that are not positive or no multiples of `n_heads`, an
        odd geometric width a head with rotary positions, a `dropout_p` outside [0, 1],
        or an unknown `implementation`.
        """
        check_size("d_model", d_model)
        v_dim = sem_dim + geo_dim if v_dim is None else v_dim
        widths = {"sem_dim": sem_dim, "geo_dim": geo_dim, "v_dim": v_dim}
        n_kv_heads = check_heads(n_heads, n_kv_heads, widths)
        check_probability("dropout_p", dropout_p)
        check_implementation(implementation, "attention")
        check_positive("rope_base", rope_base)
        if window is not None:
            check_size("window", window)
        if rope_enabled:
            check_rotary("geo_dim / n_heads", geo_dim // n_heads)
            rotary_frequencies(geo_dim // n_heads, rope_base, rope_scaling)
        keys = jax.random.split(key, 6)

        def of_keys(width):
            return width // n_heads * n_kv_heads

        def linear(d_in, d_out, key):
            return Linear(d_in, d_out, use_bias, dtype, key=key)

        self.q_sem = linear(d_model, sem_dim, keys[0])
        self.k_sem = linear(d_model, of_keys(sem_dim), keys[1])
        self.q_geo = linear(d_model, geo_dim, keys[2])
        self.k_geo = linear(d_model, of_keys(geo_dim), keys[3])
        self.v_proj = linear(d_model, of_keys(v_dim), keys[4])
        self.o_proj = linear(v_dim, d_model, keys[5])
        dtype = jnp.float32 if dtype is None else dtype
        self.gate = jnp.zeros((n_heads,), dtype) if decoupled_gate else None
        self.dropout = Dropout(dropout_p)
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.sem_dim = sem_dim
        self.geo_dim = geo_dim
        self.v_dim = v_dim
        self.rope_enabled = rope_enabled
        self.rope_base = rope_base
        self.rope_scaling = rope_scaling
        self.is_causal = is_causal
        self.window = window
        self.implementation = implementation

    @property
    def mode(self) -> AttentionMode:
        """`AttentionMode.DECOUPLED`."""
        return AttentionMode.DECOUPLED

    @property
    def scale(self) -> float:
        """One: the queries are scaled, each path by its own width."""
        return 1.0

    @property
    def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """`n_kv_heads`, and the widths a head of both keys together and of values."""
        key = (self.sem_dim + self.geo_dim) // self.n_heads
        return (self.n_kv_heads, key), (self.n_kv_heads, self.v_dim // self.n_heads)

    def heads(
        self,
        x: Float[Array, "*batch seq d_model"],
        positions: Int[Array, "*batch seq"],
    ) -> tuple[
        Float[Array, "*batch seq heads d"],
        Float[Array, "*batch seq kv_heads d"],
        Float[Array, "*batch seq kv_heads v"],
    ]:
        """Queries, keys and values of tokens at `positions`, both paths in one."""
        q_sem = split_heads(self.q_sem(x), self.n_heads)
        q_geo = split_heads(self.q_geo(x), self.n_heads)
        k_sem = split_heads(self.k_sem(x), self.n_kv_heads)
        k_geo = split_heads(self.k_geo(x), self.n_kv_heads)
        if self.rope_enabled:
            q_geo, k_geo = (
                rotary(x, positions, self.rope_base, self.rope_scaling)
                for x in (q_geo, k_geo)
            )
        sem, geo = self._path_weights()
        q = jnp.concatenate([_weighted(q_sem, sem), _weighted(q_geo, geo)], axis=-1)
        k = jnp.concatenate([k_sem, k_geo], axis=-1)
        return q, k, split_heads(self.v_proj(x), self.n_kv_heads)

    def _path_weights(self):
        """Factor on the semantic and on the geometric queries, by head."""
        scales = (
            1 / math.sqrt(width / self.n_heads)
            for width in (self.sem_dim, self.geo_dim)
        )
        if self.gate is None:
            shares = (1.0, 1.0)
        else:
            g = jax.nn.sigmoid(accumulate(self.gate))
            shares = (2 * g, 2 - 2 * g)
        ones = jnp.ones((self.n_heads,))
        return tuple(
            ones * share * scale for share, scale in zip(shares, scales, strict=True)
        )


def _weighted(q, weights):
    wide = accumulate(q)
    weights = weights.astype(wide.dtype)[:, None]
    weights = weights.reshape((1,) * (q.ndim - 2) + weights.shape)
    return (wide * weights).astype(q.dtype)
