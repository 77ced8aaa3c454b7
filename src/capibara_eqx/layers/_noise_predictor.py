import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Integer, PRNGKeyArray

from ..internal import check_ids, check_last_axis, check_size, silu
from ._linear import Linear
from ._noise_schedule import check_like, spread_times
from ._norm import LayerNorm
from ._positions import sinusoidal_positions


class NoisePredictor(eqx.Module):
    r"""Guesses the noise in a vector from its time and a condition.

    $$\hat\epsilon(x_t, t, c) = W_3\, \mathrm{silu}(W_2\, \mathrm{silu}(W_1\,
    \mathrm{LN}([x_t, c, \tau(t)])))$$

    with biases, and $\tau$ `sinusoidal_positions`. Without a condition $c = 0$. Ho,
    Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, arXiv 2006.11239, is
    where the noise is what a network predicts.

    !!! example

        ```python
        predictor = NoisePredictor(64, key=key)
        eps_hat = predictor(x_t, jnp.asarray(500), x[:, 0])
        ```
    """

    norm: LayerNorm
    in_proj: Linear
    hidden_proj: Linear
    out_proj: Linear
    d_model: int = eqx.field(static=True)
    time_embed_dim: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        time_embed_dim: int = 128,
        mlp_mult: int = 4,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of the vectors and of the condition.
        - `time_embed_dim`: width of the embedded time.
        - `mlp_mult`: hidden width, `max(64, mlp_mult * d_model)`.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes that are not positive.
        """
        check_size("d_model", d_model)
        check_size("time_embed_dim", time_embed_dim)
        check_size("mlp_mult", mlp_mult)
        in_key, hidden_key, out_key = jax.random.split(key, 3)
        hidden = max(64, mlp_mult * d_model)
        width = 2 * d_model + time_embed_dim
        self.norm = LayerNorm(width, dtype=dtype)
        self.in_proj = Linear(width, hidden, dtype=dtype, key=in_key)
        self.hidden_proj = Linear(hidden, hidden, dtype=dtype, key=hidden_key)
        self.out_proj = Linear(hidden, d_model, dtype=dtype, key=out_key)
        self.d_model = d_model
        self.time_embed_dim = time_embed_dim

    @jax.named_scope("capibara_eqx.layers.NoisePredictor")
    def __call__(
        self,
        x_t: Float[Array, "*batch d_model"],
        t: Integer[Array, "*times"],
        condition: Float[Array, "*batch d_model"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch d_model"]:
        """**Arguments:**

        - `x_t`: noisy vectors, `(*batch, d_model)`.
        - `t`: one time, or one for each vector, `(*batch,)`.
        - `condition`: `(*batch, d_model)`, or `None` for none; its dtype is that of the
            computation.
        - `key`: ignored.

        **Returns:**

        `(*batch, d_model)`, in the dtype of `x_t`.

        **Raises:**

        `ValueError` for inputs that do not fit.
        """
        del key
        name = "NoisePredictor"
        check_last_axis(name, "x_t", x_t, self.d_model)
        check_ids(name, "t", t)
        if condition is None:
            condition = jnp.zeros_like(x_t)
        check_like(name, "condition", condition.shape, x_t.shape)
        dtype = condition.dtype
        times = spread_times(name, t, x_t.shape[:-1])
        time = sinusoidal_positions(times, self.time_embed_dim, dtype=dtype)
        h = jnp.concatenate([x_t.astype(dtype), condition, time], axis=-1)
        h = silu(self.in_proj(self.norm(h)))
        return self.out_proj(silu(self.hidden_proj(h))).astype(x_t.dtype)
