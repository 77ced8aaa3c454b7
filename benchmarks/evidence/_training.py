"""One training loop for all experiments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from capibara_eqx.layers import weight_decay_mask
from capibara_eqx.train import learning_rate_at


@dataclass(frozen=True)
class Schedule:
    """AdamW with gradients clipped to norm one; the rate warms up, then a cosine falls.

    `warmup` is the share of the steps in which it does; `evaluations` is how often the
    model is judged, evenly over the steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 20


def train(
    model: PyTree,
    sample: Callable[[PRNGKeyArray], Any],
    loss: Callable[[Any, Any, PRNGKeyArray], Array],
    evaluate: Callable[[Any], dict[str, float]],
    schedule: Schedule,
    *,
    key: PRNGKeyArray,
    front: optax.GradientTransformation | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Train a model on batches that are drawn on the device.

    **Arguments:**

    - `model`: whose arrays of real numbers are trained.
    - `sample`: a batch from a key.
    - `loss`: of a model and a batch; its key is for dropout.
    - `evaluate`: what a point of the curve says beside step and mean loss.
    - `schedule`: how.
    - `key`: for the batches and dropout.
    - `front`: what gradients pass through before all else.

    **Returns:**

    `(model, curve)`: the trained model, and a dictionary for each evaluation.
    """
    optimizer = optax.chain(
        optax.identity() if front is None else front,
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(schedule.weight_decay, weight_decay_mask),
    )
    trained, fixed = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, drawn):
        trained, state = carry
        key, rate = drawn
        batch_key, loss_key = jax.random.split(key)
        batch = sample(batch_key)

        def objective(trained):
            return loss(eqx.combine(trained, fixed), batch, loss_key)

        value, gradients = jax.value_and_grad(objective)(trained)
        # optax divides a number by a count of steps.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, trained)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return (optax.apply_updates(trained, updates), state), value

    @jax.jit
    def advance(carry, keys, rates):
        carry, losses = jax.lax.scan(step, carry, (keys, rates))
        return carry, losses.mean()

    carry = trained, optimizer.init(trained)
    curve = []
    rates = _rates(schedule)
    length = rates.shape[1]
    for index in range(schedule.evaluations):
        keys = jax.random.split(jax.random.fold_in(key, index), length)
        carry, value = advance(carry, keys, rates[index])
        model = eqx.combine(carry[0], fixed)
        point = {"step": (index + 1) * length, "loss": float(value), **evaluate(model)}
        print(f"    {_line(point)}", flush=True)
        curve.append(point)
    return model, curve


def size(model: PyTree) -> int:
    """The number of trained numbers."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def _rates(schedule: Schedule) -> Float[Array, "evaluations steps"]:
    if schedule.steps % schedule.evaluations:
        raise ValueError(
            f"`steps` must be a multiple of `evaluations`, got {schedule.steps} and "
            f"{schedule.evaluations}."
        )
    rates = [
        learning_rate_at(
            step / schedule.steps,
            peak=schedule.learning_rate,
            warmup_fraction=schedule.warmup,
            final_fraction=0.0,
        )
        for step in range(1, schedule.steps + 1)
    ]
    return jnp.asarray(rates, jnp.float32).reshape(schedule.evaluations, -1)


def _line(point: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in point.items())
