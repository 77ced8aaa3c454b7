"""A selective state space whose states may turn, of the library's public parts."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int, PRNGKeyArray

from capibara_eqx.kernels import linear_recurrence
from capibara_eqx.layers import AbstractSequenceMixer, Linear


_GAIN = 4.0


class RotatingSSM(AbstractSequenceMixer):
    r"""One complex state a channel, which the input makes decay and turn.

    $$h_t = e^{-\mathrm{softplus}(4 r_t) + i\pi\sigma(4 \theta_t)} h_{t-1} + u_t, \qquad
    y_t = W_o\,(\mathrm{Re}\,h_t \odot \mathrm{silu}(z_t)), \qquad
    r, \theta, u, z = W x + b$$

    A turn lies between none and half a circle, and a decay between 0 and 1; the factor
    lets small weights come near the ends, which long rows need.
    Without `rotates` there is no $\theta$, and decays are positive, as those of Mamba.
    That a data-dependent rotation tracks what positive decays cannot is the argument of
    Mamba-3. Padding and packing are not for this layer.
    """

    in_proj: Linear
    out_proj: Linear
    d_inner: int = eqx.field(static=True)
    rotates: bool = eqx.field(static=True)

    def __init__(
        self, d_model: int, expand: int = 2, rotates: bool = True, *, key: PRNGKeyArray
    ):
        in_key, out_key = jax.random.split(key)
        self.d_inner = expand * d_model
        self.rotates = rotates
        width = (4 if rotates else 3) * self.d_inner
        self.in_proj = Linear(d_model, width, key=in_key)
        self.out_proj = Linear(self.d_inner, d_model, key=out_key)

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        del key
        cache = self.init_cache(x.shape[:-2])
        return self.prefill(x, cache, segment_ids=segment_ids)[0]

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Complex[Array, "*batch d_inner"]:
        del max_len
        return jnp.zeros((*batch_shape, self.d_inner), jnp.complex64)

    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Complex[Array, "*batch d_inner"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], Complex[Array, "*batch d_inner"]]:
        if segment_ids is not None:
            raise NotImplementedError("RotatingSSM reads rows without segments.")
        u, z, rate, *turn = jnp.split(self.in_proj(x), 4 if self.rotates else 3, -1)
        angle = jnp.zeros_like(rate)
        if self.rotates:
            angle = jnp.pi * jax.nn.sigmoid(_GAIN * turn[0])
        decay = jnp.exp(jax.lax.complex(-jax.nn.softplus(_GAIN * rate), angle))
        driven = jax.lax.complex(u, jnp.zeros_like(u))
        h, cache = linear_recurrence(decay, driven, initial_state=cache)
        return self.out_proj(h.real * jax.nn.silu(z)), cache

    def step(
        self,
        x: Float[Array, "*batch d_model"],
        cache: Complex[Array, "*batch d_inner"],
    ) -> tuple[Float[Array, "*batch d_model"], Complex[Array, "*batch d_inner"]]:
        y, cache = self.prefill(x[..., None, :], cache)
        return y[..., 0, :], cache
