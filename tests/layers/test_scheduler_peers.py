"""Whole chains, step by step, against the schedulers of diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerances import assert_close

from capibara_eqx.layers import (
    DenoiseState,
    NoiseSchedule,
    SamplingSchedule,
    denoise_step,
)


pytestmark = pytest.mark.slow

CASES = [
    ("ddpm", {}),
    ("ddpm", {"clip_x0": 1.0}),
    ("ddim", {}),
    ("ddim", {"eta": 0.7}),
    ("ddim", {"clip_x0": 1.0}),
    ("dpm", {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("scheduler", "options"), CASES, ids=str)
@pytest.mark.parametrize(
    ("total", "steps"), [(1000, 12), (1000, 50), (1000, 1000), (100, 7), (40, 1)]
)
def test_a_whole_chain(monkeypatch, scheduler, options, total, steps):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    if scheduler == "dpm" and steps == total:
        pytest.skip("a grid that visits a time twice")
    # The stochastic steps take their noise from this module's function.
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    clip = "clip_x0" in options
    if scheduler == "dpm":
        theirs = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=total)
    else:
        kind = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
        theirs = kind[scheduler](num_train_timesteps=total, clip_sample=clip)
        # The betas come back as small differences of these, which float32 spoils.
        betas = torch.linspace(1e-4, 0.02, total, dtype=torch.float64)
        theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    theirs.set_timesteps(steps)
    ours = SamplingSchedule(NoiseSchedule(total), steps, scheduler, **options)
    assert theirs.timesteps.tolist() == ours.timesteps().tolist()
    assert_close(
        ours.noise.alpha_bar(), theirs.alphas_cumprod, dtype="float32", length=total
    )

    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5)).astype("float32")
    want = torch.tensor(x, dtype=theirs.alphas_cumprod.dtype)
    got = jnp.asarray(x)
    state = DenoiseState.start(got)
    step = jax.jit(functools.partial(denoise_step, ours))
    for i, t in enumerate(theirs.timesteps):
        eps, noise = rng.standard_normal((2, 3, 5)).astype("float32")
        drawn = torch.tensor(noise)
        arguments = {}
        if scheduler == "ddpm":
            monkeypatch.setattr(module, "randn_tensor", lambda *a, z=drawn, **k: z)
        elif ours.eta > 0:
            arguments = {"eta": ours.eta, "variance_noise": drawn}
        want = theirs.step(torch.tensor(eps), t, want, **arguments).prev_sample
        got, state = step(state, got, jnp.asarray(eps), jnp.asarray(noise))
        # They multiply `total` numbers in float32.
        assert_close(got, want, dtype="float32", length=total, name=f"step {i}")
