"""Diffusion as the papers write it: loops over float64 numbers, no tables."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from support.numpy_oracles import Array, layer_norm, silu, wide


def alpha_bars(steps: int, start: float = 1e-4, end: float = 0.02) -> list[float]:
    """The products of 1 - beta for linear betas."""
    logs, out = [], []
    for t in range(steps):
        beta = start if steps == 1 else start + (end - start) * t / (steps - 1)
        logs.append(math.log1p(-beta))
        out.append(math.exp(math.fsum(logs)))
    return out


def ddpm_step(now: float, after: float, x: Array, eps: Array, z: Array) -> Array:
    """Equations 6 and 7 of 2006.11239, alpha-bar `now` and `after`."""
    alpha = now / after
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    mean = math.sqrt(after) * (1 - alpha) / (1 - now) * x0
    mean = mean + math.sqrt(alpha) * (1 - after) / (1 - now) * x
    return mean + math.sqrt((1 - after) / (1 - now) * (1 - alpha)) * z


def ddim_step(
    now: float, after: float, x: Array, eps: Array, z: Array, eta: float = 0.0
) -> Array:
    """Equations 12 and 16 of 2010.02502."""
    sigma = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    rest = math.sqrt(max(1 - after - sigma**2, 0.0))
    return math.sqrt(after) * x0 + rest * eps + sigma * z


def dpm_chain(kept: list[float], x: Array, epsilons: list[Array]) -> list[Array]:
    """Algorithm 2 of 2211.01095; behind the last time sigma is 0 and lambda infinite.

    The first step has no prediction before it, the last is of first order too.
    """
    log_ratio = [0.5 * math.log(a / (1 - a)) for a in kept]
    out, previous = [], x
    for i, (a, eps) in enumerate(zip(kept, epsilons, strict=True)):
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if i == len(kept) - 1:
            x = x0
        else:
            h = log_ratio[i + 1] - log_ratio[i]
            D = x0
            if i > 0:
                r = (log_ratio[i] - log_ratio[i - 1]) / h
                D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
            after = kept[i + 1]
            x = (
                math.sqrt((1 - after) / (1 - a)) * x
                - math.sqrt(after) * math.expm1(-h) * D
            )
        previous = x0
        out.append(x)
    return out


def chain(
    scheduler: str,
    kept: list[float],
    x: Array,
    epsilons: list[Array],
    noises: list[Array],
    eta: float = 0.0,
) -> list[Array]:
    """Where a chain with these predictions stands after each of its steps."""
    if scheduler == "dpm":
        return dpm_chain(kept, x, epsilons)
    out = []
    for i, a in enumerate(kept):
        after = kept[i + 1] if i + 1 < len(kept) else 1.0
        if scheduler == "ddpm":
            x = ddpm_step(a, after, x, epsilons[i], noises[i])
        else:
            x = ddim_step(a, after, x, epsilons[i], noises[i], eta)
        out.append(x)
    return out


def sample(
    scheduler: str,
    kept: list[float],
    x: Array,
    predict: Callable[[Array, int], Array],
) -> Array:
    """The end of a chain that draws nothing; `predict(x, i)` is the noise at step i."""
    epsilons: list[Array] = []
    start = x
    for i in range(len(kept)):
        epsilons.append(predict(x, i))
        zeros = [np.zeros_like(x)] * (i + 1)
        # The first steps of a longer chain: the oracle of dpm looks at the last one.
        known = kept[: i + 2]
        padded = epsilons + [epsilons[-1]] * (len(known) - i - 1)
        x = chain(scheduler, known, start, padded, zeros + zeros[:1])[i]
    return x


def unit_rms(x: Array) -> Array:
    x = wide(x)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-12)


def predict_noise(
    params: dict[str, Any], x: Array, t: Any, condition: Array | None
) -> Array:
    """The MLP on the normalised [x, condition, time], times `t` one for each vector."""
    x = wide(x)
    condition = np.zeros_like(x) if condition is None else wide(condition)
    width = params["in_proj.weight"].shape[1] - 2 * x.shape[-1]
    time = np.zeros((*x.shape[:-1], width))
    times = np.broadcast_to(np.asarray(t), x.shape[:-1])
    for row in np.ndindex(x.shape[:-1]):
        for k in range(width):
            angle = int(times[row]) * 10000.0 ** (-2 * (k // 2) / width)
            time[row][k] = math.cos(angle) if k % 2 else math.sin(angle)
    h = np.concatenate([x, condition, time], axis=-1)
    h = layer_norm(h, params["norm.weight"], params["norm.bias"])
    for name in ("in_proj", "hidden_proj", "out_proj"):
        h = h @ wide(params[f"{name}.weight"]).T + wide(params[f"{name}.bias"])
        h = h if name == "out_proj" else silu(h)
    return h


def noise_loss(
    params: dict[str, Any],
    features: Array,
    targets: Array,
    t: Array,
    noise: Array,
    steps: int,
    mask: Array | None = None,
) -> float:
    """Mean over the tokens that count of the mean squared error."""
    kept = np.asarray(alpha_bars(steps))[t][..., None]
    x_t = np.sqrt(kept) * unit_rms(targets) + np.sqrt(1 - kept) * wide(noise)
    error = predict_noise(params, x_t, t, features) - wide(noise)
    total, count = 0.0, 0
    for row in np.ndindex(error.shape[:-1]):
        if mask is None or mask[row]:
            total += float(np.mean(error[row] ** 2))
            count += 1
    return total / max(count, 1)
