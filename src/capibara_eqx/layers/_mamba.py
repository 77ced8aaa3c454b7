import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..arrays import apply_weight
from ..internal import (
    NO_STEP,
    accumulate,
    accumulator_dtype,
    check_choice,
    check_positive,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation, selective_scan
from ._activation import check_activation
from ._conv1d_block import Conv1DBlock, Conv1DCache
from ._linear import Linear
from ._recurrent import AbstractRecurrent
from ._step_size import check_step_range, step_bias


class MambaCache(eqx.Module):
    """The convolution's last inputs and the state, all that Mamba remembers."""

    conv: Conv1DCache
    state: Float[Array, "*batch d_inner d_state"]


class Mamba(AbstractRecurrent):
    r"""The Mamba layer: a selective state space behind a short convolution and a gate.

    $$u, z = W_{in} x, \quad u = \mathrm{silu}(\mathrm{conv}(u)), \quad
    \delta, B, C = W_x u, \quad \Delta = \mathrm{softplus}(W_\Delta \delta + b_\Delta)$$

    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \quad
    y = W_{out}\,((C_t \cdot h_t + D u_t)\, \mathrm{silu}(z_t))$$

    with $A = -e^{A_{\log}}$. Work and memory are linear in the length of the sequence,
    the state has a fixed size. Gu and Dao, *Mamba: Linear-Time Sequence Modeling with
    Selective State Spaces*, arXiv 2312.00752; initialised as there: $A_n = -n$,
    $\Delta$ log-uniform in `[dt_min, dt_max]` at zero input, $D = 1$.

    The state is float32 or wider whatever the dtype of the input. `weight_decay_mask`
    leaves $A_{\log}$, $D$ and the biases alone.

    !!! example

        ```python
        layer = Mamba(64, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A_log", "D"})

    in_proj: Linear
    conv: Conv1DBlock
    x_proj: Linear
    dt_proj: Linear
    A_log: Float[Array, "{self.d_inner} {self.d_state}"]
    D: Float[Array, " {self.d_inner}"]
    out_proj: Linear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    dt_rank: int = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        activation: str = "silu",
        implementation: str | None = None,
        conv_implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `d_state`: states a channel.
        - `d_conv`: taps of the convolution, in tokens.
        - `expand`: channels inside, `d_inner = expand * d_model`.
        - `dt_rank`: rank of the map that gives the step sizes; `"auto"` is
            `ceil(d_model / 16)`.
        - `dt_min`, `dt_max`: range of the step sizes at initialisation.
        - `dt_init`: `"random"` draws the step-size weights uniformly in
            $\pm\mathrm{dt\_scale}/\sqrt{\mathrm{dt\_rank}}$, `"constant"` sets them to
            its upper end.
        - `dt_scale`: see `dt_init`.
        - `dt_init_floor`: no step size is smaller at initialisation.
        - `bias`: whether the input and output maps have biases.
        - `conv_bias`: whether the convolution has one.
        - `activation`: after the convolution: `"silu"`, `"gelu"`, `"relu"` or
            `"relu2"`. The gate is always silu.
        - `implementation`: passed to `kernels.selective_scan`.
        - `conv_implementation`: passed to `kernels.causal_conv`; if not given as
            `implementation`, or the default beside `"associative"`, which only the scan
            has.
        - `dtype`: of the parameters; `A_log`, `D` and the step-size bias are float32
            or wider.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes that are not positive, `dt_min > dt_max`, or an unknown
        `dt_rank`, `dt_init`, `activation`, `implementation` or `conv_implementation`.
        """
        sizes = {
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
        }
        for name, value in sizes.items():
            check_size(name, value)
        check_step_range(dt_min, dt_max, dt_init_floor)
        check_positive("dt_scale", dt_scale)
        if isinstance(dt_rank, str):
            check_choice("dt_rank", dt_rank, ("auto",))
            dt_rank = math.ceil(d_model / 16)
        check_size("dt_rank", dt_rank)
        check_choice("dt_init", dt_init, ("random", "constant"))
        check_activation(activation)
        check_implementation(implementation, "selective_scan")
        if conv_implementation is None and implementation != "associative":
            conv_implementation = implementation
        check_implementation(conv_implementation, "causal_conv")

        in_key, conv_key, x_key, dt_key, out_key = jax.random.split(key, 5)
        d_inner = expand * d_model
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        self.in_proj = Linear(d_model, 2 * d_inner, bias, dtype, key=in_key)
        self.conv = Conv1DBlock(
            d_inner,
            d_inner,
            d_conv,
            groups=d_inner,
            activation=activation,
            use_bias=conv_bias,
            implementation=conv_implementation,
            dtype=dtype,
            key=conv_key,
        )
        self.x_proj = Linear(
            d_inner, dt_rank + 2 * d_state, use_bias=False, dtype=dtype, key=x_key
        )
        self.dt_proj = _step_projection(
            dt_rank,
            d_inner,
            (dt_min, dt_max, dt_init_floor),
            (dt_init, dt_scale),
            dtype,
            key=dt_key,
        )
        self.A_log = jnp.broadcast_to(
            jnp.log(jnp.arange(1, d_state + 1, dtype=wide)), (d_inner, d_state)
        )
        self.D = jnp.ones((d_inner,), wide)
        self.out_proj = Linear(d_inner, d_model, bias, dtype, key=out_key)
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.implementation = implementation

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> MambaCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        shape = (*batch_shape, self.d_inner, self.d_state)
        state = jnp.zeros(shape, accumulator_dtype(self.A_log.dtype))
        return MambaCache(self.conv.init_cache(batch_shape), state)

    def _read(self, x, cache, segment_ids):
        u, z = jnp.split(self.in_proj(zero_padding(x, segment_ids)), 2, axis=-1)
        segment = cache.conv.segment
        u, conv = self.conv.prefill(u, cache.conv, segment_ids=segment_ids)
        ends = [self.dt_rank, self.dt_rank + self.d_state]
        delta, B, C = jnp.split(self.x_proj(u), ends, axis=-1)
        delta = apply_weight(self.dt_proj.weight, delta)
        reset = None
        if segment_ids is not None:
            valid = segment_ids[..., None] >= 0
            delta = jnp.where(valid, delta, jnp.asarray(NO_STEP, delta.dtype))
            reset = segment_starts(segment_ids, segment.astype(segment_ids.dtype))
        y, state = selective_scan(
            u,
            delta,
            -jnp.exp(accumulate(self.A_log)),
            B,
            C,
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=cache.state,
            reset=reset,
            implementation=self.implementation,
        )
        y = zero_padding(self.out_proj(y), segment_ids)
        return y, MambaCache(conv, state.astype(cache.state.dtype))


def _step_projection(dt_rank, d_inner, dt_range, dt_weights, dtype, *, key) -> Linear:
    """The map to step sizes, its bias the inverse softplus of the wanted steps."""
    dt_init, dt_scale = dt_weights
    linear_key, weight_key, bias_key = jax.random.split(key, 3)
    linear = Linear(dt_rank, d_inner, use_bias=True, dtype=dtype, key=linear_key)
    limit = dt_scale / math.sqrt(dt_rank)
    shape, weight_dtype = linear.weight.shape, linear.weight.dtype
    if dt_init == "random":
        weight = jax.random.uniform(weight_key, shape, weight_dtype, -limit, limit)
    else:
        weight = jnp.full(shape, limit, weight_dtype)
    dt_min, dt_max, floor = dt_range
    wide = accumulator_dtype(weight_dtype)
    bias = step_bias(d_inner, dt_min, dt_max, floor, wide, key=bias_key)
    return eqx.tree_at(lambda m: (m.weight, m.bias), linear, (weight, bias))
