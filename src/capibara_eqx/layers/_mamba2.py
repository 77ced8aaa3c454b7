import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_positive,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation, ssd
from ._activation import check_activation
from ._conv1d_block import Conv1DBlock, Conv1DCache
from ._gated_norm import GatedRMSNorm
from ._inner_heads import inner_heads
from ._linear import Linear
from ._recurrent import AbstractRecurrent
from ._step_size import check_step_range, step_bias


class Mamba2Cache(eqx.Module):
    """The convolution's last inputs and the state, all that Mamba-2 remembers."""

    conv: Conv1DCache
    state: Float[Array, "*batch n_heads head_dim d_state"]


class Mamba2(AbstractRecurrent):
    r"""The Mamba-2 layer: a state space with one decay a head, between conv and gate.

    $$z, u, B, C, \delta = W_{in} x, \quad u, B, C = \mathrm{silu}(\mathrm{conv}(u, B,
    C)), \quad \Delta = \mathrm{clip}(\mathrm{softplus}(\delta + b_\Delta))$$

    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t^\top, \quad
    y = W_{out}\,\mathrm{norm}((h_t C_t + D u_t)\, \mathrm{silu}(z_t))$$

    with one $\Delta$, $A = -e^{A_{\log}}$ and $D$ a head, a state of `(head_dim,
    d_state)` a head, and one $B$ and $C$ a group of heads. Sequences are read as
    products of matrices (`kernels.ssd`), one token by the recurrence. Dao and Gu,
    *Transformers are SSMs*, arXiv 2405.21060; initialised as there: $A$ uniform in
    `A_init_range`, $\Delta$ log-uniform in `[dt_min, dt_max]` at zero input, $D = 1$.

    The state is float32 or wider whatever the dtype of the input. `weight_decay_mask`
    leaves $A_{\log}$, $D$, the norm and the biases alone.

    !!! example

        ```python
        layer = Mamba2(64, d_state=32, head_dim=16, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "D", "dt_bias"})

    in_proj: Linear
    conv: Conv1DBlock
    dt_bias: Float[Array, " {self.n_heads}"]
    A_log: Float[Array, " {self.n_heads}"]
    D: Float[Array, " {self.n_heads}"]
    norm: GatedRMSNorm
    out_proj: Linear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_groups: int = eqx.field(static=True)
    dt_limit: tuple[float, float] = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        activation: str = "silu",
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `d_state`: columns of the state of a head.
        - `d_conv`: taps of the convolution, in tokens.
        - `expand`: channels inside, `d_inner = expand * d_model`.
        - `head_dim`: channels a head, which divides `d_inner`.
        - `n_groups`: pairs of $B$ and $C$; neighbouring heads share one.
        - `dt_min`, `dt_max`: range of the step sizes at initialisation.
        - `dt_init_floor`: no step size is smaller at initialisation.
        - `dt_limit`: least and greatest step size ever, in prefill and step alike.
        - `A_init_range`: range of $-A$ at initialisation.
        - `norm_before_gate`: whether the gate scales what comes out of the norm, see
            `GatedRMSNorm`; the channels of each group of heads are normalised apart.
        - `norm_eps`: added to the mean square.
        - `bias`: whether the input and output maps have biases.
        - `conv_bias`: whether the convolution has one.
        - `activation`: after the convolution: `"silu"`, `"gelu"`, `"relu"` or
            `"relu2"`. The gate is always silu.
        - `chunk_size`, `implementation`: passed to `kernels.ssd`, the latter also to
            `kernels.causal_conv`.
        - `dtype`: of the parameters; `A_log`, `D` and `dt_bias` are float32 or wider.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes or a `norm_eps` that are not positive, sizes that do not
        divide each other, ranges that are empty, or an unknown `activation` or
        `implementation`.
        """
        sizes = {
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "head_dim": head_dim,
            "n_groups": n_groups,
        }
        for name, value in sizes.items():
            check_size(name, value)
        check_positive("norm_eps", norm_eps)
        d_inner = expand * d_model
        n_heads = inner_heads(d_model, expand, head_dim, n_groups)
        check_step_range(dt_min, dt_max, dt_init_floor)
        _check_interval("dt_limit", dt_limit, closed=True)
        _check_interval("A_init_range", A_init_range, closed=False)
        if chunk_size is not None:
            check_size("chunk_size", chunk_size)
        check_activation(activation)
        check_implementation(implementation, "ssd", "causal_conv")

        in_key, conv_key, dt_key, A_key, out_key = jax.random.split(key, 5)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        channels = d_inner + 2 * n_groups * d_state
        self.in_proj = Linear(
            d_model, d_inner + channels + n_heads, bias, dtype, key=in_key
        )
        self.conv = Conv1DBlock(
            channels,
            channels,
            d_conv,
            groups=channels,
            activation=activation,
            use_bias=conv_bias,
            implementation=implementation,
            dtype=dtype,
            key=conv_key,
        )
        self.dt_bias = step_bias(
            n_heads, dt_min, dt_max, dt_init_floor, wide, key=dt_key
        )
        low, high = A_init_range
        self.A_log = jnp.log(
            jax.random.uniform(A_key, (n_heads,), wide, minval=low, maxval=high)
        )
        self.D = jnp.ones((n_heads,), wide)
        self.norm = GatedRMSNorm(d_inner, n_groups, norm_before_gate, norm_eps, dtype)
        self.out_proj = Linear(d_inner, d_model, bias, dtype, key=out_key)
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = d_state
        self.head_dim = head_dim
        self.n_heads = n_heads
        self.n_groups = n_groups
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.chunk_size = chunk_size
        self.implementation = implementation

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Mamba2Cache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        shape = (*batch_shape, self.n_heads, self.head_dim, self.d_state)
        state = jnp.zeros(shape, accumulator_dtype(self.A_log.dtype))
        return Mamba2Cache(self.conv.init_cache(batch_shape), state)

    def _read(self, x, cache, segment_ids):
        projected = self.in_proj(zero_padding(x, segment_ids))
        ends = [self.d_inner, projected.shape[-1] - self.n_heads]
        z, mixed, delta = jnp.split(projected, ends, axis=-1)
        segment = cache.conv.segment
        mixed, conv = self.conv.prefill(mixed, cache.conv, segment_ids=segment_ids)
        width = self.n_groups * self.d_state
        u, B, C = jnp.split(mixed, [self.d_inner, self.d_inner + width], axis=-1)
        u = u.reshape(*x.shape[:-1], self.n_heads, self.head_dim)
        B, C = (v.reshape(*x.shape[:-1], self.n_groups, self.d_state) for v in (B, C))
        dt = self._steps(delta, segment_ids)
        reset = None
        if segment_ids is not None:
            reset = segment_starts(segment_ids, segment.astype(segment_ids.dtype))
        A = -jnp.exp(accumulate(self.A_log)).astype(dt.dtype)
        y, state = ssd(
            u,
            dt * jnp.broadcast_to(A, dt.shape),
            B,
            C,
            coefficient=dt,
            initial_state=cache.state,
            reset=reset,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        D = jnp.broadcast_to(self.D.astype(dt.dtype)[:, None], u.shape)
        y = (y.astype(dt.dtype) + D * u.astype(dt.dtype)).astype(x.dtype)
        y = self.out_proj(self.norm(y.reshape(z.shape), z))
        y = zero_padding(y, segment_ids)
        return y, Mamba2Cache(conv, state.astype(cache.state.dtype))

    def _steps(self, delta, segment_ids):
        """Step sizes, in float32 or wider. Padding takes none, whatever the limit."""
        delta = delta.astype(accumulator_dtype(delta.dtype, self.dt_bias.dtype))
        bias = jnp.broadcast_to(self.dt_bias.astype(delta.dtype), delta.shape)
        dt = jax.nn.softplus(delta + bias)
        least, most = self.dt_limit
        if least > 0 or most < math.inf:
            dt = jnp.clip(dt, least, most)
        if segment_ids is not None:
            dt = jnp.where(segment_ids[..., None] >= 0, dt, jnp.zeros_like(dt))
        return dt


def _check_interval(name, interval, *, closed):
    """Raise `ValueError` unless `interval` is two numbers, in order, 0 or above."""
    try:
        low, high = (float(bound) for bound in interval)
    except (TypeError, ValueError):
        low = high = math.nan
    least = low >= 0 if closed else 0 < low and high < math.inf
    if not (least and low <= high):
        kind = "0 <= least <= greatest" if closed else "0 < least <= greatest < inf"
        raise ValueError(f"`{name}` must be a pair with {kind}, got {interval!r}.")
