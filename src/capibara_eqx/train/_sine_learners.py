"""What each method learns on sine regression, and with what rates it then adapts."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..layers import Linear
from ..meta import (
    Task,
    WithRates,
    maml,
    meta_sgd,
    only,
    rates_like,
    reptile,
    sgd,
)


# Of the inner steps in training; what the rates at test time are multiples of.
INNER_RATE = 0.02
_WIDTH = 40
_REPTILE_STEPS = 5
_MOST = 10.0


class SineModel(eqx.Module):
    """Finn et al.'s network for sines: two hidden layers of 40 ReLUs."""

    body: tuple[Linear, Linear]
    head: Linear

    def __init__(self, *, key: PRNGKeyArray):
        first, second, last = jax.random.split(key, 3)
        self.body = (
            Linear(1, _WIDTH, key=first),
            Linear(_WIDTH, _WIDTH, key=second),
        )
        self.head = Linear(_WIDTH, 1, key=last)

    def __call__(self, x: Float[Array, "*batch 1"]) -> Float[Array, "*batch 1"]:
        for layer in self.body:
            x = jax.nn.relu(layer(x))
        return self.head(x)


def squared_error(model: SineModel, batch: PyTree) -> Float[Array, ""]:
    """The mean squared error on `(x, y)`."""
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def clipped_sgd(
    rates: float | PyTree[Float[Array, "..."]], *, per_step: bool = False
) -> optax.GradientTransformation:
    """Gradient descent of gradients between -10 and 10, as Zintgraf et al. clip them.

    So that no start and no rate diverges, which would end the comparison.
    """
    return optax.chain(optax.clip(_MOST), sgd(rates, per_step=per_step))


def make_learner(method: str, model: SineModel) -> tuple[PyTree, Callable[..., Any]]:
    """What a method trains, and the loss of a task that it trains it on."""
    inner: dict[str, Any] = {"optimizer": clipped_sgd(INNER_RATE), "steps": 1}
    if method == "joint":
        return model, _pooled
    if method == "reptile":
        return model, _reptile
    if method == "meta_sgd":
        learner = WithRates.init(model, INNER_RATE)
        return learner, meta_sgd(squared_error, steps=1, optimizer=clipped_sgd)
    if method == "anil":
        return model, maml(squared_error, where=_head(model), **inner)
    return model, maml(squared_error, first_order=method == "fomaml", **inner)


def model_and_rates(method: str, learner: PyTree) -> tuple[SineModel, PyTree]:
    """The start from which a method adapts, and a rate for each of its parameters."""
    if method == "meta_sgd":
        return learner.model, learner.rates
    rates = rates_like(learner, INNER_RATE, per="element")
    if method == "anil":
        # A rate of zero is a parameter that does not adapt.
        rates = jax.tree.map(
            lambda rate, adapts: rate if adapts else jnp.zeros_like(rate),
            rates,
            _head(learner),
        )
    return learner, rates


def _head(model: SineModel) -> PyTree:
    return only(model, lambda model: model.head)


def _pooled(model, task, *, key=None):
    """No inner loop: all examples of all tasks, as if they were one."""
    return squared_error(model, _examples(task))


def _reptile(model, task, *, key=None):
    """Which has no use for a query: it learns from all examples, as joint training."""
    loss = reptile(
        squared_error, optimizer=clipped_sgd(INNER_RATE), steps=_REPTILE_STEPS
    )
    return loss(model, Task(_examples(task), None))


def _examples(task: Task) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), task.support, task.query)
