import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_positive,
    check_range,
    check_size,
    segment_starts,
    zero_padding,
)
from ..kernels import check_implementation, linear_recurrence
from ._cache import advance_segment, fresh_segment
from ._gated_norm import GatedRMSNorm
from ._inner_heads import inner_heads
from ._linear import Linear
from ._norm import RMSNorm
from ._recurrent import AbstractRecurrent
from ._step_size import check_step_range, step_bias
from ._trapezoid import LastToken, trapezoid


class Mamba3Cache(eqx.Module):
    """The state but for the last token, that token, and how far the state has turned.

    `turn` holds cosines and sines.
    """

    state: Float[Array, "*batch n_heads head_dim d_state"]
    turn: Float[Array, "*batch n_heads angles 2"]
    last: LastToken
    segment: Int[Array, "*batch"]


class Mamba3(AbstractRecurrent):
    r"""The Mamba-3 layer: a state that turns, by the trapezoidal rule, without a conv.

    $$z, u, B, C, \delta, \alpha, \mu, \theta = W_{in} x, \quad
    \Delta = \mathrm{softplus}(\delta + b_\Delta), \quad
    A = -\max(\mathrm{softplus}(\alpha), A_{floor}), \quad \lambda = \sigma(\mu)$$

    $$h_t = e^{\Delta_t A_t} h_{t-1} + (1 - \lambda_t) \Delta_t e^{\Delta_t A_t}\,
    u_{t-1} \bar B_{t-1}^\top + \lambda_t \Delta_t\, u_t \bar B_t^\top, \quad
    y = W_{out} ((h_t \bar C_t + D u_t)\, \mathrm{silu}(z_t))$$

    $$\bar B_t = R_t (\mathrm{norm}(B_t) + b_B), \quad
    \bar C_t = R_t (\mathrm{norm}(C_t) + b_C), \quad
    R_t = R_{t-1}\, R(\pi \Delta_t \tanh \theta_t)$$

    where $R$ turns neighbouring pairs of the first entries by their angles: the same as
    complex decays, with which a state can count modulo. $\Delta, A, \lambda, D$ and the
    biases are one a head, the angles are shared by all, before $\Delta$. Lahoti et
    al., *Mamba-3*, arXiv 2603.15569, in its form of one input and one output a channel;
    initialised as there: $\Delta$ log-uniform in `[dt_min, dt_max]` at zero input,
    $D = 1$, $b_B = b_C = 1$. A row is one call of `kernels.ssd`.

    States are float32 or wider whatever the dtype of the input. `weight_decay_mask`
    leaves $D$, the norms and the biases alone.

    !!! example

        ```python
        layer = Mamba3(64, d_state=32, head_dim=16, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        y_t, cache = layer.step(x_t, cache)            # one token more
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"D", "dt_bias", "B_bias", "C_bias"}
    )

    in_proj: Linear
    dt_bias: Float[Array, " {self.n_heads}"]
    B_norm: RMSNorm
    C_norm: RMSNorm
    B_bias: Float[Array, "{self.n_heads} {self.d_state}"]
    C_bias: Float[Array, "{self.n_heads} {self.d_state}"]
    D: Float[Array, " {self.n_heads}"]
    norm: GatedRMSNorm | None
    out_proj: Linear
    d_model: int = eqx.field(static=True)
    d_inner: int = eqx.field(static=True)
    d_state: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    n_groups: int = eqx.field(static=True)
    angles: int = eqx.field(static=True)
    A_floor: float = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        output_norm: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `d_state`: columns of the state of a head, two or more.
        - `expand`: channels inside, `d_inner = expand * d_model`.
        - `head_dim`: channels a head, which divides `d_inner`.
        - `n_groups`: pairs of $B$ and $C$; neighbouring heads share one.
        - `rope_fraction`: share of the columns that turn, in pairs.
        - `dt_min`, `dt_max`: range of the step sizes at initialisation.
        - `dt_init_floor`: no step size is smaller at initialisation.
        - `A_floor`: the least $-A$.
        - `output_norm`: whether a norm of each head's output stands before the gate.
        - `norm_eps`: added to mean squares.
        - `chunk_size`, `implementation`: passed to `kernels.ssd`. The turns are a
            `kernels.linear_recurrence` by XLA, or by the reference if that is named.
        - `dtype`: of the parameters; `D` and the biases are float32 or wider.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes, a `norm_eps` or an `A_floor` that are not positive,
        sizes that do not divide each other, a `rope_fraction` above 1 or one that turns
        no pair, empty ranges, or an unknown `implementation`.
        """
        sizes = {
            "d_model": d_model,
            "d_state": d_state,
            "expand": expand,
            "head_dim": head_dim,
            "n_groups": n_groups,
        }
        for name, value in sizes.items():
            check_size(name, value)
        for name, value in (("norm_eps", norm_eps), ("A_floor", A_floor)):
            check_positive(name, value)
        d_inner = expand * d_model
        n_heads = inner_heads(d_model, expand, head_dim, n_groups)
        if d_state < 2:
            raise ValueError(
                f"`d_state` must be 2 or more, got {d_state}: states turn in pairs."
            )
        check_range(
            "rope_fraction", rope_fraction, above=0, most=1, hint="All turn at 1."
        )
        # A product such as 100 * 0.58 may fall short of the whole number it should be.
        angles = math.floor(d_state * rope_fraction + 1e-6) // 2
        if angles == 0:
            raise ValueError(
                f"`rope_fraction` must turn a pair or more of the {d_state} states, so "
                f"be at least 2/{d_state}, got {rope_fraction}."
            )
        check_step_range(dt_min, dt_max, dt_init_floor)
        if chunk_size is not None:
            check_size("chunk_size", chunk_size)
        check_implementation(implementation, "ssd")

        in_key, dt_key, out_key = jax.random.split(key, 3)
        wide = accumulator_dtype(jnp.float32 if dtype is None else dtype)
        channels = 2 * d_inner + 2 * n_groups * d_state + 3 * n_heads + angles
        self.in_proj = Linear(d_model, channels, False, dtype, key=in_key)
        self.dt_bias = step_bias(
            n_heads, dt_min, dt_max, dt_init_floor, wide, key=dt_key
        )
        self.B_norm = RMSNorm(d_state, norm_eps, dtype=dtype)
        self.C_norm = RMSNorm(d_state, norm_eps, dtype=dtype)
        self.B_bias = jnp.ones((n_heads, d_state), wide)
        self.C_bias = jnp.ones((n_heads, d_state), wide)
        self.D = jnp.ones((n_heads,), wide)
        norm = GatedRMSNorm(d_inner, n_heads, True, norm_eps, dtype)
        self.norm = norm if output_norm else None
        self.out_proj = Linear(d_inner, d_model, False, dtype, key=out_key)
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = d_state
        self.head_dim = head_dim
        self.n_heads = n_heads
        self.n_groups = n_groups
        self.angles = angles
        self.A_floor = float(A_floor)
        self.chunk_size = chunk_size
        self.implementation = implementation

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Mamba3Cache:
        """See `AbstractSequenceMixer.init_cache`; `max_len` is ignored."""
        del max_len
        wide = self.dt_bias.dtype
        heads = (*batch_shape, self.n_heads)
        one = jnp.broadcast_to(jnp.array([1.0, 0.0], wide), (*heads, self.angles, 2))
        last = LastToken(
            jnp.zeros((*heads, self.d_state), wide),
            jnp.zeros((*heads, self.head_dim), wide),
            jnp.zeros(heads, wide),
        )
        state = jnp.zeros((*heads, self.head_dim, self.d_state), wide)
        return Mamba3Cache(state, one, last, fresh_segment(batch_shape))

    def _read(self, x, cache, segment_ids):
        wide = accumulator_dtype(x.dtype, self.dt_bias.dtype)
        z, u, B, C, *scalars, theta = self._projected(zero_padding(x, segment_ids))
        delta, alpha, mu = (v.astype(wide) for v in scalars)
        dt = jax.nn.softplus(delta + jnp.broadcast_to(self.dt_bias, delta.shape))
        dt = zero_padding(dt, segment_ids)
        A = -jnp.maximum(jax.nn.softplus(alpha), self.A_floor)
        mix = jax.nn.sigmoid(mu)
        reset = None
        if segment_ids is not None:
            before = cache.segment.astype(segment_ids.dtype)
            reset = segment_starts(segment_ids, before)
        turn = self._turns(dt, theta.astype(wide), cache.turn, reset)
        u = u.astype(wide).reshape(*u.shape[:-1], self.n_heads, self.head_dim)
        y, state, last = trapezoid(
            u,
            dt * A,
            self._turned(B, self.B_norm, self.B_bias, turn),
            self._turned(C, self.C_norm, self.C_bias, turn),
            mix * dt,
            (1 - mix) * dt,
            cache.state,
            cache.last,
            segment_ids=segment_ids,
            reset=reset,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        y = y + jnp.broadcast_to(self.D.astype(wide)[:, None], u.shape) * u
        y = self._gated(y.reshape(z.shape).astype(x.dtype), z)
        end = _of_modulus_one(turn[..., -1, :, :]).astype(cache.turn.dtype)
        segment = advance_segment(cache.segment, segment_ids)
        cache = Mamba3Cache(state.astype(cache.state.dtype), end, last, segment)
        return zero_padding(self.out_proj(y), segment_ids), cache

    def _projected(self, x):
        width = self.n_groups * self.d_state
        sizes = [self.d_inner] * 2 + [width] * 2 + [self.n_heads] * 3
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return jnp.split(self.in_proj(x), ends, axis=-1)

    def _turns(self, dt, theta, start, reset) -> Complex[Array, "*batch seq n a"]:
        """How far the state has turned at each token, as numbers of modulus one.

        A product of numbers rather than a sum of angles, which would lose digits as
        it grows.
        """
        angle = math.pi * dt[..., None] * jnp.tanh(theta)[..., None, :]
        turn = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
        size = self.n_heads * self.angles
        flat = turn.reshape(*turn.shape[:-2], size)
        entering = jnp.zeros_like(flat)
        if reset is not None:
            entering = jnp.where(reset[..., None], flat, entering)
        start = jax.lax.complex(start[..., 0], start[..., 1]).astype(flat.dtype)
        turned, _ = linear_recurrence(
            flat,
            entering,
            initial_state=start.reshape(*start.shape[:-2], size),
            reset=reset,
            implementation="reference" if self.implementation == "reference" else None,
        )
        return turned.reshape(turn.shape)

    def _turned(self, maps, norm, bias, turn):
        """The map of each head: of its group, normed, with its bias, turned."""
        wide = turn.real.dtype
        maps = maps.astype(wide).reshape(*maps.shape[:-1], self.n_groups, self.d_state)
        maps = jnp.repeat(norm(maps), self.n_heads // self.n_groups, axis=-2)
        maps = maps + jnp.broadcast_to(bias.astype(wide), maps.shape)
        pairs, rest = jnp.split(maps, [2 * self.angles], axis=-1)
        pairs = pairs.reshape(*pairs.shape[:-1], self.angles, 2)
        turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * turn
        pairs = jnp.stack([turned.real, turned.imag], axis=-1)
        flat = pairs.reshape(*maps.shape[:-1], 2 * self.angles)
        return jnp.concatenate([flat, rest], axis=-1)

    def _gated(self, y, z):
        if self.norm is not None:
            return self.norm(y, z)
        return (accumulate(y) * jax.nn.silu(accumulate(z))).astype(y.dtype)


def _of_modulus_one(turn) -> Float[Array, "*batch n a 2"]:
    """Cosines and sines of what was multiplied together.

    The roundings of a turn that repeats are the same ones every time: without this a
    long stream would grow or shrink by them.
    """
    parts = jnp.stack([turn.real, turn.imag], axis=-1)
    return parts * jax.lax.rsqrt(jnp.sum(parts * parts, axis=-1, keepdims=True))
