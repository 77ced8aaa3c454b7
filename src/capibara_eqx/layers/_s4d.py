import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from ..internal import accumulate, accumulator_dtype, check_choice
from ._discretize import check_discretization, discretize
from ._hippo import hippo_diagonal
from ._state_space import (
    AbstractStateSpace,
    check_state_space,
    complex_normal,
    from_pairs,
)
from ._state_space_output import StateSpaceOutput
from ._state_space_scan import (
    AbstractSystem,
    Chunk,
    as_complex,
    as_functional,
    as_state,
    einsum,
    lifted,
)
from ._step_size import log_step


INITS = ("lin", "inv", "legs", "quad")


class S4D(AbstractStateSpace):
    r"""The S4D layer: a diagonal state space of each channel, then a gate that mixes.

    $$h_t = \bar A \odot h_{t-1} + \bar B u_t, \quad
    s_t = 2\,\mathrm{Re}(C \cdot h_t) + D u_t, \quad
    y = a \odot \sigma(b), \quad a, b = W\,\mathrm{gelu}(s) + c$$

    with $N/2$ complex states a channel, one of each conjugate pair; $\bar A$ and
    $\bar B$ are $A$ and $B = 1$ in steps of $\Delta$. Nothing depends on the input, so
    the states amount to a convolution with
    $K_t = 2\,\mathrm{Re} \sum_n C_n \bar A_n^t \bar B_n$. Gu, Gupta, Goel and Ré, *On
    the Parameterization and Initialization of Diagonal State Space Models*, arXiv
    2206.11893. $B$ is no parameter, since only $C_n B_n$ has an effect.

    A row is read as one convolution by Fourier transforms, in $O(L \log L)$ for length
    $L$ (`mode="convolution"`); in chunks, each a small convolution, with the state
    handed on between them (`"chunked"`: causal to the last bit, memory for
    $L / \mathrm{chunk\_size}$ states); or token by token (`"recurrent"`, whose gradient
    keeps all states). The results agree up to rounding. Rows with `segment_ids`, rows
    of one chunk and `prefill` are read in chunks, `step` is the recurrence.

    The state, the kernel and the transforms are float32 or wider whatever the dtype of
    the input. `weight_decay_mask` leaves $A$, $\Delta$, $D$ and the bias alone.

    !!! example

        ```python
        layer = S4D(64, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"log_A_real", "A_imag", "log_dt", "D"}
    )

    log_A_real: Float[Array, "{self.d_model} {self.d_state//2}"]
    A_imag: Float[Array, "{self.d_model} {self.d_state//2}"]
    C: Float[Array, "{self.d_model} {self.d_state//2} 2"]
    log_dt: Float[Array, " {self.d_model}"]
    D: Float[Array, " {self.d_model}"]
    output: StateSpaceOutput
    d_model: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    discretization: str = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    chunk_size: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
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
        - `init`: of $A_n$, for $N$ = `d_state` and $n < N/2$: `"lin"`
            $-\frac12 + i \pi n$, `"inv"`
            $-\frac12 + i \frac{N}{\pi} (\frac{N}{2n+1} - 1)$, `"quad"`
            $-\frac12 + \frac{i}{\pi} (2n+1)^2$, `"legs"` the eigenvalues of the normal
            part of HiPPO-LegS.
        - `discretization`: `"zoh"` or `"bilinear"`.
        - `dt_min`, `dt_max`: the step sizes are log-uniform between them.
        - `dropout_rate`: probability of dropping an element in front of the gate.
        - `mode`: how a row is read: `"convolution"`, `"chunked"` or `"recurrent"`.
        - `chunk_size`: tokens of a chunk.
        - `dtype`: of the parameters of the gate; those of the states are float32 or
            wider.
        - `key`: for the initial values; $C$ is complex normal, $D$ normal.

        **Raises:**

        `ValueError` for sizes that are not positive, an odd `d_state`,
        `dt_min > dt_max`, a `dropout_rate` outside [0, 1], or an unknown `init`,
        `discretization` or `mode`.
        """
        check_state_space(
            d_model, d_state, dt_min, dt_max, dropout_rate, mode, chunk_size
        )
        check_choice("init", init, INITS)
        check_discretization(discretization)
        C_key, dt_key, D_key, out_key = jax.random.split(key, 4)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        decay, frequencies = _initial(init, d_state, wide)
        shape = (d_model, d_state // 2)
        self.log_A_real = jnp.broadcast_to(jnp.log(decay), shape)
        self.A_imag = jnp.broadcast_to(frequencies, shape)
        self.C = complex_normal(shape, wide, key=C_key)
        self.log_dt = log_step((d_model,), dt_min, dt_max, wide, key=dt_key)
        self.D = jax.random.normal(D_key, (d_model,), wide)
        self.output = StateSpaceOutput(d_model, dropout_rate, dtype, key=out_key)
        self.d_model = d_model
        self.d_state = d_state
        self.discretization = discretization
        self.mode = mode
        self.chunk_size = chunk_size

    def _system(self, dtype):
        def real(x):
            return accumulate(x).astype(dtype)

        A = jax.lax.complex(-jnp.exp(real(self.log_A_real)), real(self.A_imag))
        dt = jnp.broadcast_to(jnp.exp(real(self.log_dt))[:, None], A.shape)
        A_bar, B_bar = discretize(A, dt, self.discretization)
        return _DiagonalSystem(A_bar, B_bar, from_pairs(self.C, dtype))


def _initial(init: str, d_state: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """Minus the real parts of A, and the imaginary parts."""
    if init == "legs":
        poles = hippo_diagonal(d_state, "legs", dtype).eigenvalues
        return -jnp.real(poles), jnp.imag(poles)
    n = np.arange(d_state // 2)
    frequencies = {
        "lin": np.pi * n,
        "inv": d_state / np.pi * (d_state / (2 * n + 1) - 1),
        "quad": (2 * n + 1) ** 2 / np.pi,
    }[init]
    return jnp.full(n.shape, 0.5, dtype), jnp.asarray(frequencies, dtype)


class _DiagonalSystem(AbstractSystem):
    A: Complex[Array, "d_model half"]
    B: Complex[Array, "d_model half"]
    C: Complex[Array, "d_model half"]

    def advance(self, h, u):
        A, B = lifted(self.A, h.ndim), lifted(self.B, h.ndim)
        return as_state(A * as_complex(h) + B * u[..., None].astype(B.dtype))

    def readout(self, h):
        return jnp.sum(lifted(as_functional(self.C), h.ndim) * h, axis=-1)

    def chunk(self, size):
        powers, last = _powers(self.A, size)
        reach = as_state(powers * self.B[None])
        observe = as_functional(powers * (self.A * self.C)[None])

        def leap(h):
            return as_state(lifted(last, h.ndim) * as_complex(h))

        return Chunk(self.readout(reach), reach, observe, leap)

    def kernel(self, length):
        # A power is the product of one of `size` small ones and one of few large ones,
        # so that the Vandermonde matrix, `length` times the states, is never there.
        size = math.isqrt(length - 1) + 1
        powers, last = _powers(self.A, size)
        large, _ = _powers(last, -(-length // size))
        blocks = einsum(
            "idn,jdn->ijd",
            as_functional(large * self.C[None]),
            as_state(powers * self.B[None]),
        )
        return blocks.reshape(-1, blocks.shape[-1])[:length]


def _powers(a: Array, count: int) -> tuple[Array, Array]:
    """`a ** 0` to `a ** (count - 1)`, and `a ** count`.

    By products alone: no logarithm that is infinite where `a` is zero, and nothing that
    could overflow where `a` is smaller than one.
    """
    powers, step = jnp.ones_like(a)[None], a
    while len(powers) < count:
        powers = jnp.concatenate([powers, powers * step[None]])
        step = step * step
    powers = powers[:count]
    return powers, powers[-1] * a
