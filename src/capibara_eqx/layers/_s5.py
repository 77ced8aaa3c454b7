import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_choice,
    check_last_axis,
    check_probability,
    check_segment_ids,
    check_sequence,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation, linear_recurrence
from ._activation import activate
from ._cache import advance_segment, check_cache, fresh_segment
from ._discretize import check_discretization, discretize
from ._dropout import Dropout
from ._hippo import hippo_diagonal
from ._linear import Linear
from ._mixer import AbstractSequenceMixer
from ._step_size import check_step_range, log_step


C_INITS = ("lecun_normal", "truncated_normal", "complex_normal")
# No slower decay if eigenvalues are clipped.
_LARGEST_REAL_PART = -1e-4
# Of a standard normal variable between -2 and 2.
_TRUNCATED_STD = math.sqrt(
    1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
)


class S5Cache(eqx.Module):
    """The complex state, as pairs of real numbers, and the document it is of."""

    state: Float[Array, "*batch half 2"]
    segment: Int[Array, "*batch"]


class S5(AbstractSequenceMixer):
    r"""One diagonal state space for all channels, and a gate.

    $$h_t = \bar\Lambda h_{t-1} + \bar B u_t, \quad y = 2\,\mathrm{Re}(C h) + D u, \quad
    g = \mathrm{dropout}(\mathrm{gelu}(y)), \quad
    \mathrm{out} = g\, \sigma(W g + b)$$

    where $\bar\Lambda, \bar B$ are $h' = \Lambda h + B u$ with a step size for each
    state. The `d_state` eigenvalues come in conjugate pairs, of which one is kept: half
    as many complex states are computed. Smith, Warrington and Linderman, *Simplified
    State Space Layers for Sequence Modeling*, arXiv 2208.04933.

    It starts as there: as `blocks` copies of the normal part of HiPPO's matrix, in
    their eigenbasis $V$; $B = V^* B'$ and $C = C' V$, $\Delta$ log-uniform in
    `[dt_min, dt_max]`, $D$ normal. The state is float32 or wider whatever the dtype of
    the input. Complex numbers are kept as pairs, of which real part and imaginary part
    are the last axis, so that every optimizer and file format takes them.
    `weight_decay_mask` leaves the eigenvalues, $\Delta$ and $D$ alone.

    !!! example

        ```python
        layer = S5(64, 32, blocks=2, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"eigenvalues", "log_step", "D"}
    )

    eigenvalues: Float[Array, "{self.half} 2"]
    B: Float[Array, "{self.half} {self.d_model} 2"]
    C: Float[Array, "{self.d_model} {self.half} 2"]
    D: Float[Array, " {self.d_model}"]
    log_step: Float[Array, " {self.half}"]
    gate: Linear
    dropout: Dropout
    d_model: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    discretization: str = eqx.field(static=True)
    clip_eigenvalues: bool = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        blocks: int = 1,
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        clip_eigenvalues: bool = False,
        C_init: str = "lecun_normal",
        dropout_rate: float = 0.0,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `d_state`: states, real ones or one half as many complex ones.
        - `blocks`: copies of HiPPO's matrix that the states start as, of
            `d_state / blocks` states each.
        - `discretization`: `"zoh"` or `"bilinear"`.
        - `dt_min`, `dt_max`: range of the step sizes at initialisation.
        - `clip_eigenvalues`: whether real parts are read as $-10^{-4}$ where they are
            larger, so that no state can learn to grow. They start at $-1/2$.
        - `C_init`: `"lecun_normal"` draws real and imaginary part of $C'$ with variance
            `1 / d_state`, `"truncated_normal"` with variance 1, both truncated at two
            standard deviations of the normal distribution; `"complex_normal"` draws
            $C$ itself, of variance 1.
        - `dropout_rate`: probability of dropping an element after `gelu`; `prefill`
            and `step` drop nothing.
        - `implementation`: passed to `kernels.linear_recurrence`.
        - `dtype`: of the parameters; `eigenvalues`, `log_step` and `D` are float32 or
            wider.
        - `key`: for the initial values; $B'$ is `"lecun_normal"`, of variance
            `1 / d_model`.

        **Raises:**

        `ValueError` for sizes that are not positive, a `d_state` that `blocks` do not
        divide into even numbers, a `dropout_rate` outside [0, 1], `dt_min > dt_max`, or
        an unknown `discretization`, `C_init` or `implementation`.
        """
        for name, value in {"d_model": d_model, "d_state": d_state}.items():
            check_size(name, value)
        check_size("blocks", blocks)
        if d_state % (2 * blocks):
            raise ValueError(
                "`d_state` must give each of the `blocks` an even number of states, "
                f"got d_state={d_state} and blocks={blocks}. Take a multiple of "
                f"{2 * blocks}."
            )
        check_discretization(discretization)
        check_step_range(dt_min, dt_max)
        check_choice("C_init", C_init, C_INITS)
        check_probability("dropout_rate", dropout_rate)
        check_implementation(implementation, "linear_recurrence")

        B_key, C_key, D_key, step_key, gate_key = jax.random.split(key, 5)
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        wide = accumulator_dtype(dtype)
        block = hippo_diagonal(d_state // blocks, dtype=wide)
        V = jax.scipy.linalg.block_diag(*[block.V] * blocks)
        self.eigenvalues = _pair(jnp.tile(block.eigenvalues, blocks))
        B = _truncated_normal(B_key, (d_state, d_model), wide) / math.sqrt(d_model)
        self.B = _pair(V.conj().T @ B.astype(V.dtype)).astype(dtype)
        self.C = _readout(C_init, d_model, V, key=C_key).astype(dtype)
        self.D = jax.random.normal(D_key, (d_model,), wide)
        self.log_step = log_step((d_state // 2,), dt_min, dt_max, wide, key=step_key)
        self.gate = Linear(d_model, d_model, dtype=dtype, key=gate_key)
        self.dropout = Dropout(dropout_rate)
        self.d_model = d_model
        self.d_state = d_state
        self.discretization = discretization
        self.clip_eigenvalues = clip_eigenvalues
        self.implementation = implementation

    @property
    def half(self) -> int:
        """Number of complex states: one of each conjugate pair."""
        return self.d_state // 2

    @jax.named_scope("capibara_eqx.layers.S5")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`; `key` is for dropout.

        **Raises:**

        `ValueError` for an input that does not fit, or if dropout is active and there
        is no `key`.
        """
        check_sequence("S5", "x", x, self.d_model)
        y, _ = self._read(x, self.init_cache(x.shape[:-2]), segment_ids)
        return self._gated(self.dropout(y, key=key), segment_ids)

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> S5Cache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        dtype = accumulator_dtype(self.eigenvalues.dtype)
        state = jnp.zeros((*batch_shape, self.half, 2), dtype)
        return S5Cache(state, fresh_segment(batch_shape))

    @jax.named_scope("capibara_eqx.layers.S5.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: S5Cache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], S5Cache]:
        """See `AbstractSequenceMixer.prefill`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_sequence("S5", "x", x, self.d_model)
        check_cache("S5", cache, eqx.filter_eval_shape(self.init_cache, x.shape[:-2]))
        y, cache = self._read(x, cache, segment_ids)
        return self._gated(y, segment_ids), cache

    @jax.named_scope("capibara_eqx.layers.S5.step")
    def step(
        self, x: Float[Array, "*batch d_model"], cache: S5Cache
    ) -> tuple[Float[Array, "*batch d_model"], S5Cache]:
        """See `AbstractSequenceMixer.step`; there is no dropout.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_last_axis("S5.step", "x", x, self.d_model)
        y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache

    @jax.named_scope("capibara_eqx.layers.S5.discretized")
    def discretized(
        self,
    ) -> tuple[
        Complex[Array, " {self.half}"], Complex[Array, "{self.half} {self.d_model}"]
    ]:
        r"""$\bar\Lambda$ and $\bar B$ of the recurrence, in complex64 or wider."""
        real, imag = jnp.moveaxis(accumulate(self.eigenvalues), -1, 0)
        if self.clip_eigenvalues:
            real = jnp.minimum(real, _LARGEST_REAL_PART)
        step = jnp.exp(accumulate(self.log_step))
        A = jax.lax.complex(real, imag)
        A_bar, factor = discretize(A, step, self.discretization)
        return A_bar, factor[:, None] * _complex(self.B).astype(factor.dtype)

    def _read(self, x, cache, segment_ids):
        """What the gate reads, before dropout, and the new cache."""
        check_segment_ids("S5", segment_ids, x.shape[:-1])
        A_bar, B_bar = self.discretized()
        wide = accumulator_dtype(x.dtype, cache.state.dtype)
        u = zero_padding(x, segment_ids).astype(wide)
        # Products of real numbers, since `u` is real and only a real part is read.
        driven = jax.lax.complex(
            *(u @ part.astype(wide).T for part in (B_bar.real, B_bar.imag))
        )
        a = jnp.broadcast_to(A_bar.astype(driven.dtype), driven.shape)
        reset = None
        if segment_ids is not None:
            a = jnp.where(segment_ids[..., None] >= 0, a, jnp.ones_like(a))
            before = cache.segment.astype(segment_ids.dtype)
            reset = segment_starts(segment_ids, before)
        h, state = linear_recurrence(
            a,
            driven,
            initial_state=_complex(cache.state),
            reset=reset,
            implementation=self.implementation,
        )
        C_real, C_imag = jnp.moveaxis(self.C.astype(wide), -1, 0)
        y = 2 * (h.real @ C_real.T - h.imag @ C_imag.T)
        y = y + u * jnp.broadcast_to(self.D.astype(wide), u.shape)
        state = _pair(state).astype(cache.state.dtype)
        segment = advance_segment(cache.segment, segment_ids)
        return activate("gelu", y).astype(x.dtype), S5Cache(state, segment)

    def _gated(self, y, segment_ids):
        return zero_padding(y * jax.nn.sigmoid(self.gate(y)), segment_ids)


def _pair(z: Complex[Array, "*shape"]) -> Float[Array, "*shape 2"]:
    """Complex numbers as real and imaginary parts."""
    return jnp.stack([z.real, z.imag], axis=-1)


def _complex(pair: Float[Array, "*shape 2"]) -> Complex[Array, "*shape"]:
    """The complex numbers, in complex64 or wider."""
    pair = accumulate(pair)
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def _truncated_normal(key, shape, dtype):
    """Of mean zero and variance one, cut at two deviations before it is scaled."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / _TRUNCATED_STD


def _readout(C_init: str, d_model: int, V: Complex[Array, "d_state half"], *, key):
    """The initial C, as pairs."""
    d_state, half = V.shape
    wide = V.real.dtype
    if C_init == "complex_normal":
        return jax.random.normal(key, (d_model, half, 2), wide) / math.sqrt(2)
    C = _complex(_truncated_normal(key, (d_model, d_state, 2), wide)) @ V
    return _pair(C) / (math.sqrt(d_state) if C_init == "lecun_normal" else 1)
