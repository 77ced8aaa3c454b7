import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_last_axis,
    check_probability,
    check_segment_ids,
    check_sequence,
    check_size,
    segment_starts,
    zero_padding,
)
from ._cache import check_cache
from ._conv1d_block import Conv1DBlock, Conv1DCache
from ._dense_recurrence import dense_recurrence
from ._discretize import check_discretization
from ._discretize_dense import discretize_dense
from ._dropout import Dropout
from ._hippo import hippo_matrices
from ._linear import Linear
from ._mixer import AbstractSequenceMixer
from ._step_size import check_step_range, log_step


class LinearSSMCache(eqx.Module):
    """The convolution's last inputs and the state, all that LinearSSM remembers."""

    conv: Conv1DCache
    state: Float[Array, "*batch state_dim"]


class LinearSSM(AbstractSequenceMixer):
    r"""A linear time-invariant state space with a full matrix, behind a convolution.

    $$u = \mathrm{silu}(\mathrm{conv}(x)), \qquad
    h_t = \bar A h_{t-1} + \bar B u_t, \qquad
    y = \mathrm{dropout}(C h + D u) + R x$$

    where $\bar A, \bar B$ are $h' = A h + B u$ in steps of one learned size $\Delta$,
    by a zero-order hold or by the bilinear rule, and $R$ is the identity, or a linear
    map if the widths differ. $A$ starts as a HiPPO matrix, whose state holds the
    history in Legendre polynomials (Gu et al., *HiPPO: Recurrent Memory with Optimal
    Polynomial Projections*, arXiv 2008.07669; Gu et al., *Combining Recurrent,
    Convolutional, and Continuous-time Models with Linear State-Space Layers*, arXiv
    2110.13985), the step log-uniform in `[dt_min, dt_max]`, the rest normal. All of it
    is learned. The spectral radius of $\bar A$ is below one at the start; nothing
    keeps it there but the loss.

    One state serves all channels, which a token costs `state_dim` squared. The state
    is float32 or wider whatever the dtype of the input, and starts as zero.
    `weight_decay_mask` leaves $A$, $\Delta$ and the biases alone.

    !!! example

        ```python
        layer = LinearSSM(64, 32, key=jax.random.key(0))
        y = layer(x, key=key)                          # (*batch, seq, 32), dropout
        layer = eqx.nn.inference_mode(layer)
        y, cache = layer.forward(x)                    # (batch, seq, 32)
        y_t, cache = layer.forward(x_t, cache)         # one token: (batch, 32)
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"A", "log_dt"})

    conv: Conv1DBlock
    A: Float[Array, "{self.state_dim} {self.state_dim}"]
    B: Float[Array, "{self.state_dim} {self.input_dim}"]
    C: Float[Array, "{self.output_dim} {self.state_dim}"]
    D: Float[Array, "{self.output_dim} {self.input_dim}"]
    log_dt: Float[Array, ""]
    residual_proj: Linear | None
    dropout: Dropout
    input_dim: int = eqx.field(static=True)
    output_dim: int = eqx.field(static=True)
    state_dim: int = eqx.field(static=True)
    discretization: str = eqx.field(static=True)
    residual: bool = eqx.field(static=True)

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        state_dim: int = 32,
        conv_dim: int = 4,
        dropout_rate: float = 0.1,
        measure: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        residual: bool = True,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_dim`, `output_dim`: sizes of the last axis before and after.
        - `state_dim`: numbers in the state.
        - `conv_dim`: taps of the convolution, in tokens.
        - `dropout_rate`: probability of dropping an element of the output, before the
            residual; `prefill` and `step` drop nothing.
        - `measure`: `"legs"` or `"legt"`, see `hippo_initialization`.
        - `discretization`: `"zoh"` or `"bilinear"`.
        - `dt_min`, `dt_max`: range of the step size at initialisation.
        - `residual`: whether the input, or a linear map of it, is added to the result.
        - `implementation`: passed to `kernels.causal_conv`.
        - `dtype`: of the parameters; `A` and `log_dt` are float32 or wider.
        - `key`: for the initial values, normal: $B_n$ as large as that of HiPPO,
            $\sqrt{2n+1}$, for inputs of order one, the others with the standard
            deviation $1/\sqrt{\mathrm{fan\ in}}$; biases are zero.

        **Raises:**

        `ValueError` for sizes that are not positive, a `dropout_rate` outside [0, 1],
        `dt_min > dt_max`, or an unknown `measure`, `discretization` or
        `implementation`.
        """
        sizes = {
            "input_dim": input_dim,
            "output_dim": output_dim,
            "state_dim": state_dim,
            "conv_dim": conv_dim,
        }
        for name, value in sizes.items():
            check_size(name, value)
        check_probability("dropout_rate", dropout_rate)
        check_discretization(discretization)
        check_step_range(dt_min, dt_max)

        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        wide = accumulator_dtype(dtype)
        conv_key, B_key, C_key, D_key, dt_key, residual_key = jax.random.split(key, 6)

        def normal(key, *shape):
            return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1])

        hippo = hippo_matrices(state_dim, measure, wide)
        block = Conv1DBlock(
            input_dim,
            input_dim,
            conv_dim,
            groups=input_dim,
            implementation=implementation,
            dtype=dtype,
            key=conv_key,
        )
        taps = normal(conv_key, input_dim, 1, conv_dim)
        self.conv = _with_parameters(block, taps)
        self.A = hippo.A
        self.B = hippo.B[:, None].astype(dtype) * normal(B_key, state_dim, input_dim)
        self.C = normal(C_key, output_dim, state_dim)
        self.D = normal(D_key, output_dim, input_dim)
        self.log_dt = log_step((), dt_min, dt_max, wide, key=dt_key)
        self.residual_proj = None
        if residual and input_dim != output_dim:
            linear = Linear(input_dim, output_dim, dtype=dtype, key=residual_key)
            weight = normal(residual_key, output_dim, input_dim)
            self.residual_proj = _with_parameters(linear, weight)
        self.dropout = Dropout(dropout_rate)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.state_dim = state_dim
        self.discretization = discretization
        self.residual = residual

    @jax.named_scope("capibara_eqx.layers.LinearSSM")
    def __call__(
        self,
        x: Float[Array, "*batch seq input_dim"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq output_dim"]:
        """See `AbstractSequenceMixer.__call__`; `key` is for dropout.

        **Raises:**

        `ValueError` for an input that does not fit, or if dropout is active and there
        is no `key`.
        """
        check_sequence("LinearSSM", "x", x, self.input_dim)
        y, _ = self._read(x, self.init_cache(x.shape[:-2]), segment_ids)
        return self._finish(x, self.dropout(y, key=key), segment_ids)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> LinearSSMCache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        dtype = accumulator_dtype(self.A.dtype)
        state = jnp.zeros((*batch_shape, self.state_dim), dtype)
        return LinearSSMCache(self.conv.init_cache(batch_shape), state)

    @jax.named_scope("capibara_eqx.layers.LinearSSM.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq input_dim"],
        cache: LinearSSMCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq output_dim"], LinearSSMCache]:
        """See `AbstractSequenceMixer.prefill`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_sequence("LinearSSM", "x", x, self.input_dim)
        self._check_cache(x, cache)
        y, cache = self._read(x, cache, segment_ids)
        return self._finish(x, y, segment_ids), cache

    @jax.named_scope("capibara_eqx.layers.LinearSSM.step")
    def step(
        self, x: Float[Array, "*batch input_dim"], cache: LinearSSMCache
    ) -> tuple[Float[Array, "*batch output_dim"], LinearSSMCache]:
        """See `AbstractSequenceMixer.step`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_last_axis("LinearSSM.step", "x", x, self.input_dim)
        y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache

    @jax.named_scope("capibara_eqx.layers.LinearSSM.forward")
    def forward(
        self,
        x: Float[Array, "batch seq input_dim"] | Float[Array, "batch input_dim"],
        state: LinearSSMCache | Float[Array, "batch state_dim"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "batch seq output_dim"] | Float[Array, "batch output_dim"],
        LinearSSMCache,
    ]:
        """Read a batch from a state, with dropout: sequences, or one token each.

        Unlike `__call__`, where two axes are one sequence without a batch.

        **Arguments:**

        - `x`: `(batch, seq, input_dim)`, or `(batch, input_dim)` for one token a row.
        - `state`: a cache that this layer returned; an array `(batch, state_dim)`, the
            state before the first token, the convolution having seen nothing; or
            `None` for zeros.
        - `key`: for dropout.

        **Returns:**

        `(y, cache)`: the outputs with the axes of `x`, and the cache to continue from.

        **Raises:**

        `ValueError` for an input or a state that does not fit, or if dropout is active
        and there is no `key`.
        """
        check_last_axis("LinearSSM.forward", "x", x, self.input_dim)
        if x.ndim not in (2, 3) or 0 in x.shape:
            raise ValueError(
                "LinearSSM.forward: `x` must be (batch, seq, input_dim), or (batch, "
                f"input_dim) for one token a row, none of them empty; got {x.shape}. "
                "Call the layer for other batch axes."
            )
        tokens = x[:, None] if x.ndim == 2 else x
        cache = self._cache_of(state, x.shape[0])
        self._check_cache(tokens, cache)
        y, cache = self._read(tokens, cache, None)
        y = self._finish(tokens, self.dropout(y, key=key), None)
        return (y[:, 0] if x.ndim == 2 else y), cache

    @jax.named_scope("capibara_eqx.layers.LinearSSM.discretized")
    def discretized(
        self,
    ) -> tuple[
        Float[Array, "{self.state_dim} {self.state_dim}"],
        Float[Array, "{self.state_dim} {self.input_dim}"],
    ]:
        r"""The matrices $\bar A$ and $\bar B$ of the recurrence, in float32 or wider.

        With `C` they are what `ssm_step` takes.
        """
        A, dt = accumulate(self.A), jnp.exp(accumulate(self.log_dt))
        A_bar, factor = discretize_dense(A, dt, self.discretization)
        B = self.B.astype(factor.dtype)
        return A_bar, jnp.matmul(factor, B, precision=jax.lax.Precision.HIGHEST)

    def _cache_of(self, state, batch):
        if isinstance(state, LinearSSMCache):
            return state
        cache = self.init_cache((batch,))
        if state is None:
            return cache
        expected = (batch, self.state_dim)
        if not eqx.is_array(state) or state.shape != expected:
            got = state.shape if eqx.is_array(state) else type(state).__name__
            raise ValueError(
                "LinearSSM.forward: `state` must be a cache of this layer, an array "
                f"(batch, state_dim), here {expected}, or None; got {got}."
            )
        return LinearSSMCache(cache.conv, state.astype(cache.state.dtype))

    def _check_cache(self, x, cache):
        expected = eqx.filter_eval_shape(self.init_cache, x.shape[:-2])
        check_cache("LinearSSM", cache, expected)

    def _read(self, x, cache, segment_ids):
        """The readout, before dropout and residual."""
        check_segment_ids("LinearSSM", segment_ids, x.shape[:-1])
        segment = cache.conv.segment
        u, conv = self.conv.prefill(x, cache.conv, segment_ids=segment_ids)
        starts = valid = None
        if segment_ids is not None:
            valid = segment_ids >= 0
            starts = segment_starts(segment_ids, segment.astype(segment_ids.dtype))
        wide = accumulator_dtype(u.dtype, cache.state.dtype)
        A_bar, B_bar, C, D = (
            matrix.astype(wide) for matrix in (*self.discretized(), self.C, self.D)
        )
        u = u.astype(wide)
        state = cache.state.astype(wide)
        h, state = dense_recurrence(A_bar, u @ B_bar.T, state, starts, valid)
        y = (h @ C.T + u @ D.T).astype(x.dtype)
        return y, LinearSSMCache(conv, state.astype(cache.state.dtype))

    def _finish(self, x, y, segment_ids):
        """Adds the residual; what stands at padding reaches neither it nor `y`."""
        if self.residual:
            x = zero_padding(x, segment_ids)
            y = y + (x if self.residual_proj is None else self.residual_proj(x))
        return zero_padding(y, segment_ids)


def _with_parameters(layer, weight):
    """`layer` with this weight, and zeros for its bias."""
    bias = jnp.zeros_like(layer.bias)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
