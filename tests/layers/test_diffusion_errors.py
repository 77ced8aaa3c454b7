"""Bad arguments of the diffusion head and its chains: the message says what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.layers import (
    DenoiseState,
    DiffusionNextTokenHead,
    NoisePredictor,
    NoiseSchedule,
    SamplingSchedule,
    denoise,
    denoise_step,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
NAN, INFINITE = float("nan"), float("inf")


def head(**options: Any) -> DiffusionNextTokenHead:
    build: Any = DiffusionNextTokenHead
    return build(**({"d_model": 4, "time_embed_dim": 6, "key": KEY} | options))


def chain(**options: Any) -> SamplingSchedule:
    build: Any = SamplingSchedule
    return build(NoiseSchedule(), **options)


def schedule(**options: Any) -> NoiseSchedule:
    build: Any = NoiseSchedule
    return build(**options)


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


# constructor, argument, wrong values, what the message says
VALUES = [
    (head, "d_model", [0, -1, 2.5], ["positive integer"]),
    (head, "num_train_timesteps", [0, -5, 10.0], ["positive integer"]),
    (head, "num_infer_steps", [0, -1, 1.5, True], ["positive integer"]),
    (head, "time_embed_dim", [0, -2, 3.5], ["positive integer"]),
    (head, "mlp_mult", [0, -4], ["positive integer"]),
    (head, "cfg_dropout_p", [-0.1, 1.5, NAN], ["between 0 and 1"]),
    (head, "cfg_guidance_scale", [NAN, INFINITE, "1"], ["must be"]),
    (head, "loss_weight", [-0.1, NAN], ["must be"]),
    (head, "clip_x0", [0, -1.0, NAN], ["None does not clip"]),
    (chain, "clip_x0", [0.0, -1], ["None does not clip"]),
    (chain, "eta", [-0.1, 1.1, NAN], ["must"]),
    (chain, "num_infer_steps", [0, -3], ["positive integer"]),
    (schedule, "num_train_timesteps", [0, 1.5, "9"], ["positive integer"]),
    (schedule, "beta_start", [0.0, -0.1, 1.0, NAN], ["must be"]),
    (schedule, "beta_end", [0, 1, 2.0], ["must be"]),
]


@pytest.mark.parametrize(
    ("build", "argument", "value", "words"),
    [(build, name, v, words) for build, name, values, words in VALUES for v in values],
)
def test_values_out_of_bounds(build, argument, value, words):
    with refused(f"`{argument}`", str(value), *words):
        build(**{argument: value})


@pytest.mark.parametrize("build", [head, chain])
def test_an_unknown_scheduler(build):
    with refused("`scheduler`", "'dimm'", "'ddim'", "'ddpm'", "Did you mean 'ddim'"):
        build(scheduler="dimm")
    with refused("`scheduler`", "'euler'", "'dpm'"):
        build(scheduler="euler")


def test_an_unknown_spacing():
    with refused("`spacing`", "'leadin'", "Did you mean 'leading'"):
        chain(spacing="leadin")
    with refused("`spacing`", "'trailing'", "'linspace'"):
        NoiseSchedule().timesteps(3, "trailing")


def test_more_steps_than_times():
    with refused("`num_infer_steps`", "10", "11", "`num_train_timesteps`", "fewer"):
        head(num_train_timesteps=10, num_infer_steps=11)
    with refused("`num_infer_steps`", "at most 9", "10", "'linspace'", "fewer"):
        head(num_train_timesteps=10, num_infer_steps=10, scheduler="dpm")
    with refused("`num_infer_steps`", "at most 10", "'leading'"):
        NoiseSchedule(10).timesteps(11)
    head(num_train_timesteps=10, num_infer_steps=10)
    head(num_train_timesteps=10, num_infer_steps=9, scheduler="dpm")


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm"])
def test_eta_is_of_ddim(scheduler):
    with refused("`eta`", "0.5", f"'{scheduler}'", "'ddim'"):
        chain(scheduler=scheduler, eta=0.5)


def test_noise_that_does_not_fit():
    x, t = zeros(2, 3), jnp.asarray(4)
    add = NoiseSchedule().add_noise
    with refused("`noise`", "(2, 3)", "(3, 2)"):
        add(x, zeros(3, 2), t)
    with refused("`t`", "integers", "float32"):
        add(x, x, jnp.asarray(4.0))
    with refused("`t`", "(2,)", "(3,)", "broadcast_to"):
        add(x, x, jnp.asarray([1, 2, 3]))


def test_a_step_that_does_not_fit():
    x = zeros(2, 3)
    state = DenoiseState.start(x)
    with refused("denoise_step", "`eps_hat`", "(2, 3)", "(3,)"):
        denoise_step(chain(), state, x, zeros(3))
    with refused("denoise_step", "`noise`", "(2, 3)", "(2,)"):
        denoise_step(chain(scheduler="ddpm"), state, x, x, zeros(2))
    with refused("denoise_step", "`state.x0`", "(2, 3)", "(4,)"):
        denoise_step(chain(), DenoiseState.start(zeros(4)), x, x)


@pytest.mark.parametrize("options", [{"scheduler": "ddpm"}, {"eta": 0.5}], ids=str)
def test_chains_that_draw_need_something_to_draw_from(options):
    x = zeros(2, 3)
    with refused("denoise_step", "`noise`", "jax.random.normal"):
        denoise_step(chain(**options), DenoiseState.start(x), x, x)
    with refused("denoise", "`key`", "'dpm'", "eta=0"):
        denoise(chain(**options), lambda x, t: x, x)


def test_a_prediction_of_another_shape():
    with refused("`eps_hat`", "(2, 3)", "(2,)"):
        denoise(chain(), lambda x, t: x[..., 0], zeros(2, 3))


def test_the_network_and_what_does_not_fit():
    predictor = NoisePredictor(4, 6, key=KEY)
    x, t = zeros(2, 4), jnp.asarray([1, 2])
    with refused("NoisePredictor", "`x_t`", "4", "(2, 5)"):
        predictor(zeros(2, 5), t)
    with refused("NoisePredictor", "`t`", "integers"):
        predictor(x, zeros(2))
    with refused("NoisePredictor", "`t`", "(2,)", "(3,)"):
        predictor(x, jnp.asarray([1, 2, 3]))
    with refused("NoisePredictor", "`condition`", "(2, 4)", "(4,)"):
        predictor(x, t, zeros(4))


@pytest.mark.parametrize("method", ["loss", "sample", "sample_token"])
def test_a_missing_key(method):
    arguments = {
        "loss": [zeros(2, 4), zeros(2, 4)],
        "sample": [zeros(2, 4)],
        "sample_token": [zeros(2, 4), zeros(5, 4)],
    }
    for one in (head(), head(inference=True)):
        with refused("DiffusionNextTokenHead", "`key`", "key=..."):
            getattr(one, method)(*arguments[method])


def test_the_head_and_what_does_not_fit():
    x = zeros(2, 4)
    with refused("`features`", "4", "(2, 3)"):
        head().loss(zeros(2, 3), x, key=KEY)
    with refused("`targets`", "(2, 4)", "(1, 4)"):
        head().loss(x, zeros(1, 4), key=KEY)
    with refused("`mask`", "(2,)", "(3,)"):
        head().loss(x, x, mask=zeros(3, dtype="bool"), key=KEY)
    with refused("`noise`", "(2, 4)", "(2, 3)"):
        head().noise_loss(x, x, jnp.asarray(1), zeros(2, 3))
    with refused("`features`", "4", "(2, 3)"):
        head().sample(zeros(2, 3), key=KEY)
    with refused("`x0_hat`", "4", "(2, 3)"):
        head().logits(zeros(2, 3), zeros(5, 4))
    with refused("`table`", "4", "(5, 3)"):
        head().logits(x, zeros(5, 3))
