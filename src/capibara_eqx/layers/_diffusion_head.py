import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer, PRNGKeyArray

from ..internal import (
    accumulate,
    accumulator_dtype,
    check_last_axis,
    check_probability,
    check_range,
)
from ._noise_predictor import NoisePredictor
from ._noise_schedule import NoiseSchedule, check_like
from ._schedulers import SamplingSchedule, denoise


# Far below the mean square of any real row: it only keeps zero rows finite.
_TINY = 1e-12


class DiffusionNextTokenHead(eqx.Module):
    r"""Predicts the embedding of the next token by denoising it.

    A language model's feature $c$ at a position is the condition, the embedding of the
    token after it, scaled to unit root mean square, is the signal $x_0$:

    $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \quad
    \mathcal{L} = \mathrm{mean} (\hat\epsilon(x_t, t, c) - \epsilon)^2$$

    with $\hat\epsilon$ a `NoisePredictor`. Ho, Jain and Abbeel, *Denoising Diffusion
    Probabilistic Models*, arXiv 2006.11239.

    While training the condition is zeroed with probability `cfg_dropout_p`, a token at
    a time, and samples follow $\hat\epsilon_u + s (\hat\epsilon_c - \hat\epsilon_u)$,
    $s$ being `cfg_guidance_scale`: at 1 the condition alone decides, at 0 it is
    ignored, above 1 it is exaggerated. Ho and Salimans, *Classifier-Free Diffusion
    Guidance*, arXiv 2207.12598.

    The length of an embedding is taken out on both sides. The noise has unit variance,
    so that rows of another size would drown in it or outshine it at every time; and
    among rows of equal length the largest scalar product with $\hat x_0$ belongs to
    the nearest row, while raw products favour whichever row is longest.

    !!! example

        ```python
        head = DiffusionNextTokenHead(64, key=key)
        loss = head.loss(x, x2, key=key)               # features, embeddings
        x0_hat = head.sample(x, key=key)               # (*batch, 64)
        logits = head.logits(x0_hat, model.embedding.weight)
        ```
    """

    predictor: NoisePredictor
    schedule: SamplingSchedule
    # Not static, so that `eqx.tree_at` and `inference_mode` can change them.
    enabled: bool
    cfg_dropout_p: int | float | Array
    cfg_guidance_scale: int | float | Array
    loss_weight: int | float | Array
    inference: bool
    d_model: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        enabled: bool = False,
        num_train_timesteps: int = 1000,
        num_infer_steps: int = 12,
        time_embed_dim: int = 128,
        mlp_mult: int = 4,
        cfg_dropout_p: int | float = 0.10,
        cfg_guidance_scale: int | float = 1.5,
        scheduler: str = "ddim",
        loss_weight: int | float = 0.10,
        clip_x0: int | float | None = None,
        dtype: DTypeLike | None = None,
        inference: bool = False,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`, `time_embed_dim`, `mlp_mult`, `dtype`: see `NoisePredictor`;
            `d_model` is the width of features and embeddings.
        - `enabled`: whether `models.diffusion_language_loss` and
            `models.diffusion_generate` use the head; the methods here always work.
        - `num_train_timesteps`: noising steps that it is trained on.
        - `num_infer_steps`: denoising steps of a sample.
        - `cfg_dropout_p`: probability of training without the condition.
        - `cfg_guidance_scale`: see above.
        - `scheduler`, `clip_x0`: see `SamplingSchedule`.
        - `loss_weight`: of this loss beside that of the next token.
        - `inference`: whether the loss keeps every condition.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes that are not positive, a probability outside [0, 1], a
        negative weight, a guidance that is not finite, and what `SamplingSchedule`
        raises.
        """
        check_probability("cfg_dropout_p", cfg_dropout_p)
        check_range("cfg_guidance_scale", cfg_guidance_scale)
        check_range("loss_weight", loss_weight, least=0)
        noise = NoiseSchedule(num_train_timesteps)
        self.schedule = SamplingSchedule(
            noise, num_infer_steps, scheduler, clip_x0=clip_x0
        )
        self.predictor = NoisePredictor(
            d_model, time_embed_dim, mlp_mult, dtype, key=key
        )
        self.enabled = enabled
        self.cfg_dropout_p = cfg_dropout_p
        self.cfg_guidance_scale = cfg_guidance_scale
        self.loss_weight = loss_weight
        self.inference = inference
        self.d_model = d_model

    def loss(
        self,
        features: Float[Array, "*batch d_model"],
        targets: Float[Array, "*batch d_model"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, ""]:
        r"""Mean squared error of the predicted noise at random times.

        Time, noise and the loss of the condition are drawn for every token alone: a
        row of $n$ tokens sees $n$ times, not one.

        **Arguments:**

        - `features`: of the position before each target, `(*batch, d_model)`.
        - `targets`: embeddings of the next tokens, any length, `(*batch, d_model)`.
        - `mask`: which of them count, `(*batch,)`; what stands at the others, NaN
            too, changes nothing.
        - `key`: for the draws; needed at inference too.

        **Returns:**

        A scalar, float32 or wider; 0 where nothing counts.

        **Raises:**

        `ValueError` for inputs that do not fit, or a missing `key`.
        """
        if key is None:
            raise ValueError(
                "DiffusionNextTokenHead.loss: `key` is needed to draw times and noise. "
                "Pass `key=...`; a fixed one gives a loss that can be compared."
            )
        self._check_pair(features, targets, mask)
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        batch = targets.shape[:-1]
        last = self.schedule.noise.num_train_timesteps
        t = jax.random.randint(time_key, batch, 0, last)
        wide = accumulator_dtype(targets.dtype)
        noise = jax.random.normal(noise_key, targets.shape, wide)
        p = self.cfg_dropout_p
        if not (self.inference or (isinstance(p, int | float) and p == 0)):
            keep = jax.random.bernoulli(drop_key, 1 - p, batch)[..., None]
            features = jnp.where(keep, features, jnp.zeros_like(features))
        return self.noise_loss(features, targets, t, noise, mask=mask)

    def noise_loss(
        self,
        features: Float[Array, "*batch d_model"],
        targets: Float[Array, "*batch d_model"],
        t: Integer[Array, "*times"],
        noise: Float[Array, "*batch d_model"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, ""]:
        """As `loss`, at given times and with given noise.

        **Arguments:**

        - `features`, `targets`, `mask`: as of `loss`.
        - `t`: one time, or one for each target, `(*batch,)`.
        - `noise`: standard normal, `(*batch, d_model)`.

        **Returns:**

        A scalar, float32 or wider.

        **Raises:**

        `ValueError` for inputs that do not fit.
        """
        self._check_pair(features, targets, mask)
        if mask is not None:
            features = jnp.where(mask[..., None], features, jnp.zeros_like(features))
            targets = jnp.where(mask[..., None], targets, jnp.zeros_like(targets))
        x0 = _unit_rms(targets)
        noise = noise.astype(x0.dtype)
        x_t = self.schedule.noise.add_noise(x0, noise, t)
        error = self.predictor(x_t, t, features) - noise
        losses = jnp.mean(error * error, axis=-1)
        if mask is None:
            return jnp.mean(losses)
        losses = jnp.where(mask, losses, jnp.zeros_like(losses))
        count = jnp.sum(mask, dtype=losses.dtype)
        return jnp.sum(losses) / jnp.maximum(count, 1)

    def sample(
        self,
        features: Float[Array, "*batch d_model"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch d_model"]:
        r"""Draws the embedding of the next token, $\hat x_0$, by denoising noise.

        **Arguments:**

        - `features`: the conditions, `(*batch, d_model)`.
        - `key`: for the noise at the start, and in each step of `"ddpm"`.

        **Returns:**

        `(*batch, d_model)`, in the dtype of `features`.

        **Raises:**

        `ValueError` for features that do not fit, or a missing `key`.
        """
        if key is None:
            raise ValueError(
                "DiffusionNextTokenHead.sample: `key` is needed for the noise that a "
                "sample starts from. Pass `key=...`."
            )
        check_last_axis("DiffusionNextTokenHead", "features", features, self.d_model)
        start_key, step_key = jax.random.split(key)
        dtype = accumulator_dtype(features.dtype)
        x = jax.random.normal(start_key, features.shape, dtype)

        def predict(x_t, t):
            return self._guided(x_t, t, features)

        x0 = denoise(self.schedule, predict, x, key=step_key)
        return x0.astype(features.dtype)

    def logits(
        self,
        x0_hat: Float[Array, "*batch d_model"],
        table: Float[Array, "vocab d_model"],
    ) -> Float[Array, "*batch vocab"]:
        r"""$\hat x_0 \cdot e_v$ for every row of the table, scaled to unit RMS.

        **Arguments:**

        - `x0_hat`: what `sample` returned, `(*batch, d_model)`.
        - `table`: embeddings, `(vocab, d_model)`; a row of zeros scores 0.

        **Returns:**

        `(*batch, vocab)`, in the dtype of `x0_hat`; the nearest row has the largest.

        **Raises:**

        `ValueError` for widths that are not `d_model`.
        """
        name = "DiffusionNextTokenHead.logits"
        check_last_axis(name, "x0_hat", x0_hat, self.d_model)
        check_last_axis(name, "table", table, self.d_model)
        return x0_hat @ _unit_rms(table).astype(x0_hat.dtype).T

    def sample_token(
        self,
        features: Float[Array, "*batch d_model"],
        table: Float[Array, "vocab d_model"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Int[Array, "*batch"]:
        """The id whose row is nearest to a sample; all chance is in the sample.

        **Arguments:**

        - `features`, `key`: as of `sample`.
        - `table`: embeddings, `(vocab, d_model)`.

        **Returns:**

        Ids, `(*batch,)`.

        **Raises:**

        `ValueError` as `sample` and `logits`.
        """
        x0_hat = accumulate(self.sample(features, key=key))
        return jnp.argmax(self.logits(x0_hat, table), axis=-1).astype(jnp.int32)

    def _guided(self, x_t, t, features):
        scale = self.cfg_guidance_scale
        if isinstance(scale, int | float) and scale in (0, 1):
            return self.predictor(x_t, t, features if scale == 1 else None)
        both = self.predictor(
            jnp.stack([x_t, x_t]), t, jnp.stack([features, jnp.zeros_like(features)])
        )
        with_it, without = both[0], both[1]
        return without + jnp.asarray(scale, x_t.dtype) * (with_it - without)

    def _check_pair(self, features, targets, mask):
        name = "DiffusionNextTokenHead.loss"
        check_last_axis(name, "features", features, self.d_model)
        check_like(name, "targets", targets.shape, features.shape)
        if mask is not None:
            check_like(name, "mask", mask.shape, features.shape[:-1])


def _unit_rms(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """`x` with unit root mean square, zero where it is zero; float32 or wider."""
    x = accumulate(x)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _TINY)
