from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import accumulate, accumulator_dtype
from ._hippo import hippo_diagonal
from ._low_rank_system import LowRankSystem
from ._state_space import (
    AbstractStateSpace,
    check_state_space,
    complex_normal,
    from_pairs,
)
from ._state_space_output import StateSpaceOutput
from ._step_size import log_step


# LegT's normal part does not decay; a logarithm needs that it does.
_LEAST_DECAY = 1e-4


class S4(AbstractStateSpace):
    r"""The S4 layer: a HiPPO state space of each channel, then a gate that mixes.

    $$h_t = \bar A h_{t-1} + \bar B u_t, \quad s_t = C h_t + D u_t, \quad
    y = a \odot \sigma(b), \quad a, b = W\,\mathrm{gelu}(s) + c$$

    where $A = \Lambda - P P^*$ is normal plus low rank, in the eigenbasis of the normal
    part, and the steps are bilinear: $\bar A = (1 - \Delta A / 2)^{-1}
    (1 + \Delta A / 2)$, $\bar B = (1 - \Delta A / 2)^{-1} \Delta B$. Gu, Goel and Ré,
    *Efficiently Modeling Long Sequences with Structured State Spaces*, arXiv
    2111.00396. Of each conjugate pair of states one is kept.

    The kernel of a convolution comes from its generating function at the roots of
    unity, where the resolvent of $A$ is that of $\Lambda$, a Cauchy kernel, with a
    correction of low rank. $C$ is first replaced by $C (1 - \bar A^L)$, so that nothing
    of what the kernel still holds after $L$ tokens comes around: it is exact for every
    length. That is $O(L N)$ work a channel, and $O(N^3 \log L)$ for the power. A token
    costs $O(N)$. Chunks of $Q$ tokens take dense powers, once a call, which are
    $O(N^3 \log Q + N^2 Q)$ a channel.

    `mode`, caches and dtypes are as in `S4D`. `weight_decay_mask` leaves $A$, $P$, $B$,
    $\Delta$, $D$ and the bias alone.

    !!! example

        ```python
        layer = S4(64, 16, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"log_A_real", "A_imag", "P", "B", "log_dt", "D"}
    )

    log_A_real: Float[Array, "{self.d_model} {self.d_state//2}"]
    A_imag: Float[Array, "{self.d_model} {self.d_state//2}"]
    P: Float[Array, "{self.d_model} {self.d_state//2} rank 2"]
    B: Float[Array, "{self.d_model} {self.d_state//2} 2"]
    C: Float[Array, "{self.d_model} {self.d_state//2} 2"]
    log_dt: Float[Array, " {self.d_model}"]
    D: Float[Array, " {self.d_model}"]
    output: StateSpaceOutput
    d_model: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    chunk_size: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        measure: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dropout_rate: float = 0.0,
        mode: str = "convolution",
        chunk_size: int = 64,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `d_state`: states a channel, even: conjugate pairs, of which one is kept.
        - `measure`: of the HiPPO matrix at the start, `"legs"` (rank 1) or `"legt"`
            (rank 2; its normal part decays at a rate of $10^{-4}$ instead of 0).
        - `dt_min`, `dt_max`: the step sizes are log-uniform between them.
        - `dropout_rate`: probability of dropping an element in front of the gate.
        - `mode`: how a row is read: `"convolution"`, `"chunked"` or `"recurrent"`.
        - `chunk_size`: tokens of a chunk.
        - `dtype`: of the parameters of the gate; those of the states are float32 or
            wider.
        - `key`: for the initial values; $C$ is complex normal, $D$ normal.

        **Raises:**

        `ValueError` for sizes that are not positive, an odd `d_state`,
        `dt_min > dt_max`, a `dropout_rate` outside [0, 1], or an unknown `measure` or
        `mode`.
        """
        check_state_space(
            d_model, d_state, dt_min, dt_max, dropout_rate, mode, chunk_size
        )
        C_key, dt_key, D_key, out_key = jax.random.split(key, 4)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        split = hippo_diagonal(d_state, measure, wide)

        def of_each_channel(x):
            return jnp.broadcast_to(x, (d_model, *x.shape))

        decay = jnp.maximum(-jnp.real(split.eigenvalues), _LEAST_DECAY)
        self.log_A_real = of_each_channel(jnp.log(decay))
        self.A_imag = of_each_channel(jnp.imag(split.eigenvalues))
        self.P = of_each_channel(_as_pairs(split.P))
        self.B = of_each_channel(_as_pairs(split.B))
        self.C = complex_normal((d_model, d_state // 2), wide, key=C_key)
        self.log_dt = log_step((d_model,), dt_min, dt_max, wide, key=dt_key)
        self.D = jax.random.normal(D_key, (d_model,), wide)
        self.output = StateSpaceOutput(d_model, dropout_rate, dtype, key=out_key)
        self.d_model = d_model
        self.d_state = d_state
        self.mode = mode
        self.chunk_size = chunk_size

    def _system(self, dtype):
        def real(x):
            return accumulate(x).astype(dtype)

        poles = jax.lax.complex(-jnp.exp(real(self.log_A_real)), real(self.A_imag))
        P = tuple(jnp.moveaxis(from_pairs(self.P, dtype), -1, 0))
        B, C = from_pairs(self.B, dtype), from_pairs(self.C, dtype)
        return LowRankSystem(poles, P, B, C, jnp.exp(real(self.log_dt)))


def _as_pairs(z: Array) -> Array:
    return jnp.stack([jnp.real(z), jnp.imag(z)], axis=-1)
