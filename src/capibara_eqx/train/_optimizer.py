import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..internal import check_probability, check_range
from ..layers import weight_decay_mask


# What `make_optimizer` takes, as keywords of `check_range`.
OPTIMIZER_BOUNDS: dict[str, dict[str, Any]] = {
    "weight_decay": {"least": 0, "hint": "0 does not decay."},
    "clip_norm": {
        "above": 0,
        "hint": "Give None (none on the command line) not to clip.",
    },
    "b1": {"least": 0, "below": 1, "hint": "Common are 0.9 to 0.95."},
    "b2": {"least": 0, "below": 1, "hint": "Common are 0.95 to 0.999."},
    # Where a gradient has always been zero, 0 would divide zero by zero.
    "eps": {"above": 0, "hint": "Common is 1e-8."},
}


def learning_rate_at(
    progress: float,
    *,
    peak: float,
    warmup_fraction: float = 0.05,
    final_fraction: float = 0.1,
) -> float:
    r"""Linear warm-up, then a cosine, as a function of how far the run has come.

    With progress $p$, warm-up $w$ and final fraction $f$:

    $$\eta(p) = \eta_{max} \cdot \begin{cases} p / w & p < w \\
    f + (1 - f)\,\tfrac{1}{2}\left(1 + \cos \pi \tfrac{p - w}{1 - w}\right)
    & \text{otherwise}\end{cases}$$

    A function of progress, not of a count of steps, so that one schedule serves runs
    bounded by steps and runs bounded by the clock. Loshchilov and Hutter, *SGDR*,
    arXiv 1608.03983.

    **Arguments:**

    - `progress`: share of the run that is done, 0 to 1; beyond 1 the rate stays.
    - `peak`: the highest rate.
    - `warmup_fraction`: share of the run that is warm-up.
    - `final_fraction`: last rate over highest rate.

    **Returns:**

    The learning rate.

    **Raises:**

    `ValueError` for a negative progress, a peak that is not positive, or fractions
    outside [0, 1].
    """
    check_range("peak", peak, above=0)
    check_probability("warmup_fraction", warmup_fraction)
    check_probability("final_fraction", final_fraction)
    if not progress >= 0:  # so that NaN is refused too
        raise ValueError(f"`progress` must be 0 or greater, got {progress}.")
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    if progress >= 1 or warmup_fraction == 1:
        return peak * final_fraction
    angle = math.pi * (progress - warmup_fraction) / (1 - warmup_fraction)
    cosine = 0.5 * (1 + math.cos(angle))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


def make_optimizer(
    *,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's norm; its rate is set from outside.

    Weight decay acts where `weight_decay_mask` says so. The learning rate is part of
    the optimiser's state, at first 0: set it with `set_learning_rate` before a step.

    **Arguments:**

    - `weight_decay`: decay per unit of learning rate.
    - `clip_norm`: largest global norm of the gradient; `None` does not clip.
    - `b1`, `b2`, `eps`: of Adam.

    **Returns:**

    An `optax.GradientTransformation`.

    **Raises:**

    `ValueError` for a number that is not finite, a negative `weight_decay`, a
    `clip_norm` or `eps` that is not positive, or `b1`, `b2` outside [0, 1).
    """
    values = {"weight_decay": weight_decay, "b1": b1, "b2": b2, "eps": eps}
    if clip_norm is not None:
        values["clip_norm"] = clip_norm
    for name, value in values.items():
        check_range(name, value, **OPTIMIZER_BOUNDS[name])

    def build(learning_rate):
        adamw = optax.adamw(
            learning_rate,
            b1,
            b2,
            eps,
            weight_decay=weight_decay,
            mask=weight_decay_mask,
        )
        if clip_norm is None:
            return adamw
        return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)

    return optax.inject_hyperparams(build)(learning_rate=0.0)


def set_learning_rate(opt_state: PyTree, learning_rate: float) -> PyTree:
    """`opt_state` of `make_optimizer` with another learning rate."""
    return eqx.tree_at(
        lambda state: state.hyperparams["learning_rate"],
        opt_state,
        jnp.asarray(learning_rate, jnp.float32),
    )
