from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..internal import accumulate, check_choice, check_range
from ._noise_schedule import SPACINGS, NoiseSchedule, check_like, lookup


class SamplingSchedule(eqx.Module):
    r"""Which way a chain of denoising takes: its times and the rule of a step.

    With $a_i = \sqrt{\bar\alpha_{t_i}}$, $s_i = \sqrt{1 - \bar\alpha_{t_i}}$, and
    $a = 1, s = 0$ after the last time, every rule predicts the clean signal
    $\hat x_0 = (x_i - s_i \hat\epsilon) / a_i$ and goes on from it.

    - `"ddpm"`: a draw from the posterior of $x_{i+1}$ given $x_i$ and $\hat x_0$, with
        $\beta = 1 - a_i^2 / a_{i+1}^2$:
        $$x_{i+1} = \frac{a_{i+1} \beta}{s_i^2} \hat x_0
        + \frac{a_i s_{i+1}^2}{a_{i+1} s_i^2} x_i
        + \frac{s_{i+1}}{s_i} \sqrt\beta\, z$$
        Ho, Jain and Abbeel, arXiv 2006.11239.
    - `"ddim"`: with $\sigma = \mathrm{eta} \frac{s_{i+1}}{s_i} \sqrt\beta$,
        $$x_{i+1} = a_{i+1} \hat x_0 + \sqrt{s_{i+1}^2 - \sigma^2}\, \hat\epsilon
        + \sigma z$$
        Song, Meng and Ermon, arXiv 2010.02502. At `eta` 0 nothing is drawn.
    - `"dpm"`: DPM-Solver++(2M), midpoint; $\lambda = \log(a/s)$,
        $h_i = \lambda_{i+1} - \lambda_i$,
        $$x_{i+1} = \frac{s_{i+1}}{s_i} x_i + a_{i+1} (1 - e^{-h_i}) D, \quad
        D = \hat x_0 + \frac{h_i}{2 h_{i-1}} (\hat x_0 - \hat x_0^{prev})$$
        and $D = \hat x_0$ at the first and the last step. Lu et al., arXiv 2211.01095.

    The coefficients are computed in float64: $\beta$ is a small difference.

    !!! example

        ```python
        schedule = SamplingSchedule(NoiseSchedule(), 12, "dpm")
        clean = denoise(schedule, lambda x_t, t: 0.1 * x_t, x)
        ```
    """

    noise: NoiseSchedule
    num_infer_steps: int = eqx.field(static=True)
    scheduler: str = eqx.field(static=True)
    eta: int | float = eqx.field(static=True)
    clip_x0: int | float | None = eqx.field(static=True)
    spacing: str = eqx.field(static=True)

    def __init__(
        self,
        noise: NoiseSchedule,
        num_infer_steps: int = 12,
        scheduler: str = "ddim",
        eta: int | float = 0.0,
        clip_x0: int | float | None = None,
        spacing: str | None = None,
    ):
        r"""**Arguments:**

        - `noise`: the schedule that the predictor was trained with.
        - `num_infer_steps`: number of steps.
        - `scheduler`: the rule, `"ddpm"`, `"ddim"` or `"dpm"`.
        - `eta`: share of noise in a step of `"ddim"`; 1 draws as much as `"ddpm"`.
        - `clip_x0`: bound of $|\hat x_0|$, elementwise; `None` sets none. Pixels have
            bounds, embeddings have not: clipping those to 1 destroys them.
            $\hat\epsilon$ stays as predicted.
        - `spacing`: see `NoiseSchedule.timesteps`; `None` takes `"linspace"` for
            `"dpm"` and `"leading"` for the others.

        **Raises:**

        `ValueError` for an unknown `scheduler` or `spacing`, more steps than there are
        times, an `eta` outside [0, 1] or without `"ddim"`, or a bound that is not
        positive.
        """
        check_choice("scheduler", scheduler, _RULES)
        if spacing is None:
            spacing = _RULES[scheduler].spacing
        check_choice("spacing", spacing, SPACINGS)
        check_range("eta", eta, least=0, most=1)
        if eta != 0 and scheduler != "ddim":
            raise ValueError(
                f"`eta` is of the scheduler 'ddim' only, got eta={eta} with "
                f"{scheduler!r}. Leave it out, or pass scheduler='ddim'."
            )
        if clip_x0 is not None:
            check_range("clip_x0", clip_x0, above=0, hint="None does not clip.")
        noise.timesteps(num_infer_steps, spacing)
        self.noise = noise
        self.num_infer_steps = num_infer_steps
        self.scheduler = scheduler
        self.eta = eta
        self.clip_x0 = clip_x0
        self.spacing = spacing

    def timesteps(self) -> np.ndarray:
        """The times of the steps, `(num_infer_steps,)`, falling."""
        return self.noise.timesteps(self.num_infer_steps, self.spacing)

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.scheduler == "ddpm" or self.eta > 0


class DenoiseState(eqx.Module):
    r"""How far a chain has come, and the $\hat x_0$ of the step before.

    !!! example

        ```python
        state = DenoiseState.start(x)
        ```
    """

    step: Int[Array, ""]
    x0: Float[Array, "*shape"]

    @classmethod
    def start(cls, x: Float[Array, "*shape"]) -> "DenoiseState":
        """The state before the first step, for a chain that starts at `x`."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros_like(accumulate(x)))


def denoise_step(
    schedule: SamplingSchedule,
    state: DenoiseState,
    x_t: Float[Array, "*shape"],
    eps_hat: Float[Array, "*shape"],
    noise: Float[Array, "*shape"] | None = None,
) -> tuple[Float[Array, "*shape"], DenoiseState]:
    """One step of a chain, from the predicted noise; see `SamplingSchedule`.

    **Arguments:**

    - `schedule`: the chain.
    - `state`: of the last step, or `DenoiseState.start(x_t)`.
    - `x_t`: where the chain stands, any shape.
    - `eps_hat`: the noise that is predicted to be in `x_t`, at time
        `schedule.timesteps()[state.step]`.
    - `noise`: standard normal, for a `schedule` that is `stochastic`; the others
        ignore it.

    **Returns:**

    `(x, state)`: the chain one step on, in the dtype of `x_t`. A step after the last
    gives NaN.

    **Raises:**

    `ValueError` for shapes that do not fit, or a missing `noise`.

    !!! example

        ```python
        schedule = SamplingSchedule(NoiseSchedule(), 12)
        state = DenoiseState.start(x)
        for t in schedule.timesteps():
            x, state = denoise_step(schedule, state, x, 0.1 * x)
        ```
    """
    check_like("denoise_step", "eps_hat", eps_hat.shape, x_t.shape)
    check_like("denoise_step", "state.x0", state.x0.shape, x_t.shape)
    if noise is not None:
        check_like("denoise_step", "noise", noise.shape, x_t.shape)
    elif schedule.stochastic:
        raise ValueError(
            f"denoise_step: `noise` is needed by the scheduler {schedule.scheduler!r}. "
            "Pass standard normal numbers, `jax.random.normal(key, x_t.shape)`."
        )
    x = accumulate(x_t)
    eps, drawn = (
        None if array is None else array.astype(x.dtype) for array in (eps_hat, noise)
    )
    rule = _RULES[schedule.scheduler].step
    x, x0 = rule(schedule, state, x, eps, drawn)
    return x.astype(x_t.dtype), DenoiseState(state.step + 1, x0.astype(state.x0.dtype))


def denoise(
    schedule: SamplingSchedule,
    predict: Callable[[Array, Array], Array],
    x: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*shape"]:
    r"""A whole chain, from noise to signal, as one `jax.lax.scan`.

    **Arguments:**

    - `schedule`: the chain.
    - `predict`: `predict(x_t, t)` gives $\hat\epsilon$; `t` is a scalar integer, `x_t`
        is float32 or wider.
    - `x`: where it starts, standard normal, any shape.
    - `key`: for a `schedule` that is `stochastic`.

    **Returns:**

    The last $x$, in shape and dtype of `x`.

    **Raises:**

    `ValueError` for a missing `key`, or a prediction of another shape.

    !!! example

        ```python
        schedule = SamplingSchedule(NoiseSchedule(), 12, "ddpm")
        clean = denoise(schedule, lambda x_t, t: 0.1 * x_t, x, key=key)
        ```
    """
    if key is None and schedule.stochastic:
        raise ValueError(
            f"denoise: `key` is needed by the scheduler {schedule.scheduler!r}. Pass "
            "`key=...`, or take one that draws nothing: 'dpm', or 'ddim' with eta=0."
        )
    wide = accumulate(x)

    def step(carry, t):
        x_t, state = carry
        noise = None
        if key is not None and schedule.stochastic:
            draw = jax.random.fold_in(key, state.step)
            noise = jax.random.normal(draw, x_t.shape, x_t.dtype)
        return denoise_step(schedule, state, x_t, predict(x_t, t), noise), None

    times = jnp.asarray(schedule.timesteps(), jnp.int32)
    (wide, _), _ = jax.lax.scan(step, (wide, DenoiseState.start(wide)), times)
    return wide.astype(x.dtype)


class _Levels(NamedTuple):
    """Signal and noise in front of each step, and behind it."""

    a: np.ndarray
    s: np.ndarray
    a_next: np.ndarray
    s_next: np.ndarray


def _levels(schedule: SamplingSchedule) -> _Levels:
    kept = schedule.noise.alpha_bar()[schedule.timesteps()]
    after = np.append(kept[1:], 1.0)
    return _Levels(np.sqrt(kept), np.sqrt(1 - kept), np.sqrt(after), np.sqrt(1 - after))


def _clean(schedule, state, x, eps):
    """The predicted signal, clipped if the schedule says so."""
    levels = _levels(schedule)
    x0 = lookup(1 / levels.a, state.step, x.dtype) * x
    x0 = x0 - lookup(levels.s / levels.a, state.step, x.dtype) * eps
    if schedule.clip_x0 is not None:
        x0 = jnp.clip(x0, -schedule.clip_x0, schedule.clip_x0)
    return x0


def _posterior_spread(levels: _Levels) -> np.ndarray:
    beta = 1 - (levels.a / levels.a_next) ** 2
    return levels.s_next / levels.s * np.sqrt(beta)


def _ddpm(schedule, state, x, eps, noise):
    levels = _levels(schedule)
    x0 = _clean(schedule, state, x, eps)
    beta = 1 - (levels.a / levels.a_next) ** 2
    of_x0 = levels.a_next * beta / levels.s**2
    of_x = levels.a / levels.a_next * (levels.s_next / levels.s) ** 2
    at = lambda table: lookup(table, state.step, x.dtype)
    drawn = at(_posterior_spread(levels)) * noise
    return at(of_x0) * x0 + at(of_x) * x + drawn, x0


def _ddim(schedule, state, x, eps, noise):
    levels = _levels(schedule)
    x0 = _clean(schedule, state, x, eps)
    spread = schedule.eta * _posterior_spread(levels)
    # Zero at eta = 1 and little signal: rounding must not make it negative.
    rest = np.sqrt(np.maximum(levels.s_next**2 - spread**2, 0))
    at = lambda table: lookup(table, state.step, x.dtype)
    x = at(levels.a_next) * x0 + at(rest) * eps
    return (x + at(spread) * noise if schedule.eta > 0 else x), x0


def _dpm(schedule, state, x, eps, noise):
    del noise
    levels = _levels(schedule)
    x0 = _clean(schedule, state, x, eps)
    h = np.diff(np.log(levels.a / levels.s))
    extra = np.zeros(schedule.num_infer_steps)
    extra[1:-1] = h[1:] / (2 * h[:-1])
    at = lambda table: lookup(table, state.step, x.dtype)
    D = x0 + at(extra) * (x0 - state.x0.astype(x.dtype))
    # a (1 - exp(-h)) without the infinite h of the last step.
    of_D = levels.a_next - levels.s_next * levels.a / levels.s
    return at(levels.s_next / levels.s) * x + at(of_D) * D, x0


class _Rule(NamedTuple):
    step: Callable[..., tuple[Array, Array]]
    spacing: str


_RULES: dict[str, _Rule] = {
    "ddpm": _Rule(_ddpm, "leading"),
    "ddim": _Rule(_ddim, "leading"),
    "dpm": _Rule(_dpm, "linspace"),
}
