import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_choice,
    check_flag,
    check_positive,
    check_range,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation
from ._activation import activate
from ._attention_base import check_heads, joined, split_heads
from ._conv1d_block import Conv1DBlock, Conv1DCache
from ._l2_norm import l2_normalize
from ._linear import Linear
from ._mesa import MesaState, mesa
from ._norm import RMSNorm
from ._recurrent import AbstractRecurrent


SOLVERS = ("cg", "cholesky")
# What softplus makes 0.75 of: with the default bound, ridges start at 1.
_RIDGE = math.log(math.expm1(0.75))


class MesaNetCache(eqx.Module):
    """The convolution's last inputs and the sums, all that a `MesaNet` remembers."""

    conv: Conv1DCache
    sums: MesaState


class MesaNet(AbstractRecurrent):
    r"""A layer that reads with the best linear map of the keys so far to their values.

    $$G_t = \gamma_t G_{t-1} + \beta_t v_t k_t^\top, \qquad
    H_t = \gamma_t H_{t-1} + \beta_t k_t k_t^\top, \qquad
    o_t = G_t (H_t + \Lambda)^{-1} q_t$$

    which is $\Phi_t q_t$ for the $\Phi_t$ that minimises the sum of all errors
    $|\Phi k_s - v_s|^2$ so far, each with the weight that is left of it, plus a ridge
    $\Lambda = \mathrm{diag}(\lambda_\text{min} + \mathrm{softplus}(\cdot))$, learned a
    head and channel. $q$ and $k$ are linear in the input, convolved, through SiLU and
    of length one; $v$ is linear; $\gamma$ and $\beta$ are sigmoids, one a head. Then
    $W_o\, \mathrm{norm}(o)$, a head at a time, with a gate $\mathrm{silu}(W_g x)$ if
    wanted. Von Oswald et al., *MesaNet*, arXiv 2506.05233, after the Mesa layer of
    *Uncovering mesa-optimization algorithms in Transformers*, arXiv 2309.05858.

    A row is read in chunks: conjugate gradients for all tokens at once, whose products
    with $H_t$ are calls of `kernels.ssd`. Unlike the authors' program, every product
    sums up the chunks again rather than keeping the sums between them, a prefill that
    goes on from a cache is the same as one from the start, and the solver starts from
    zero with nothing added to its divisors. As there, derivatives are those of the
    exact solution, by conjugate gradients again: they fit the output as far as
    `cg_steps` are enough.

    The sums are float32 or wider whatever the dtype of the input. `weight_decay_mask`
    leaves the ridge, the norm and the biases alone.

    !!! example

        ```python
        layer = MesaNet(64, 4, cg_steps=16, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"ridge"})

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    conv: Conv1DBlock
    decay_proj: Linear
    beta_proj: Linear
    ridge: Float[Array, "{self.n_heads} {self.head_dim}"]
    norm: RMSNorm
    gate_proj: Linear | None
    o_proj: Linear
    d_model: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    cg_steps: int = eqx.field(static=True)
    ridge_min: float = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_conv: int = 4,
        solver: str = "cg",
        cg_steps: int = 30,
        ridge_min: float = 0.25,
        gate: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `n_heads`: each of `d_model / n_heads` channels.
        - `d_conv`: taps of the convolution of queries and keys, in tokens.
        - `solver`: `"cg"`, conjugate gradients, or `"cholesky"`, exact, which makes a
            matrix of `head_dim` squared for every token and head.
        - `cg_steps`: of conjugate gradients; `head_dim` of them are exact, and fewer
            are enough the larger the ridge and the fewer the keys.
        - `ridge_min`: $\lambda_\text{min}$. Ridges begin 0.75 above it.
        - `gate`: whether a gate stands behind the norm.
        - `norm_eps`: of the norm, added to mean squares.
        - `chunk_size`, `implementation`: passed to `kernels.ssd`, the latter also to
            `kernels.causal_conv`.
        - `dtype`: of the parameters; the ridge is float32 or wider.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes, a `ridge_min` or a `norm_eps` that are not positive,
        heads that do not divide the channels, a `gate` that is not True or False, or an
        unknown `solver` or `implementation`.
        """
        check_heads(n_heads, None, {"d_model": d_model})
        check_size("d_conv", d_conv)
        check_choice("solver", solver, SOLVERS)
        check_size("cg_steps", cg_steps)
        check_range("ridge_min", ridge_min, above=0)
        check_positive("norm_eps", norm_eps)
        check_flag("gate", gate)
        if chunk_size is not None:
            check_size("chunk_size", chunk_size)
        check_implementation(implementation, "ssd", "causal_conv")
        keys = jax.random.split(key, 8)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        head_dim = d_model // n_heads
        self.q_proj = Linear(d_model, d_model, False, dtype, key=keys[0])
        self.k_proj = Linear(d_model, d_model, False, dtype, key=keys[1])
        self.v_proj = Linear(d_model, d_model, False, dtype, key=keys[2])
        self.conv = Conv1DBlock(
            2 * d_model,
            2 * d_model,
            d_conv,
            groups=2 * d_model,
            use_bias=False,
            implementation=implementation,
            dtype=dtype,
            key=keys[3],
        )
        self.decay_proj = Linear(d_model, n_heads, True, dtype, key=keys[4])
        self.beta_proj = Linear(d_model, n_heads, True, dtype, key=keys[5])
        self.ridge = jnp.full((n_heads, head_dim), _RIDGE, wide)
        self.norm = RMSNorm(head_dim, norm_eps, dtype=dtype)
        self.gate_proj = None
        if gate:
            self.gate_proj = Linear(d_model, d_model, False, dtype, key=keys[6])
        self.o_proj = Linear(d_model, d_model, False, dtype, key=keys[7])
        self.d_model = d_model
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.solver = solver
        self.cg_steps = cg_steps
        self.ridge_min = float(ridge_min)
        self.chunk_size = chunk_size
        self.implementation = implementation

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> MesaNetCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        shape = (*batch_shape, self.n_heads, self.head_dim, self.head_dim)
        wide = accumulator_dtype(self.ridge.dtype)
        sums = MesaState(jnp.zeros(shape, wide), jnp.zeros(shape, wide))
        return MesaNetCache(self.conv.init_cache(batch_shape), sums)

    def _read(self, x, cache, segment_ids):
        x = zero_padding(x, segment_ids)
        qk = jnp.concatenate([self.q_proj(x), self.k_proj(x)], axis=-1)
        qk, conv = self.conv.prefill(qk, cache.conv, segment_ids=segment_ids)
        q, k = (
            l2_normalize(split_heads(half, self.n_heads))
            for half in jnp.split(qk, 2, axis=-1)
        )
        v = accumulate(split_heads(self.v_proj(x), self.n_heads))
        # Padding neither decays nor counts.
        log_decay = jax.nn.log_sigmoid(accumulate(self.decay_proj(x)))
        beta = jax.nn.sigmoid(accumulate(self.beta_proj(x)))
        reset = None
        if segment_ids is not None:
            before = cache.conv.segment.astype(segment_ids.dtype)
            reset = segment_starts(segment_ids, before)
        o, sums = mesa(
            q,
            k,
            v,
            zero_padding(log_decay, segment_ids),
            zero_padding(beta, segment_ids),
            self.ridge_min + jax.nn.softplus(accumulate(self.ridge)).astype(q.dtype),
            cache.sums,
            solver=self.solver,
            cg_steps=self.cg_steps,
            reset=reset,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        y = joined(self.norm(o)).astype(x.dtype)
        if self.gate_proj is not None:
            y = y * activate("silu", self.gate_proj(x))
        sums = jax.tree.map(lambda s, old: s.astype(old.dtype), sums, cache.sums)
        return zero_padding(self.o_proj(y), segment_ids), MesaNetCache(conv, sums)
