"""A context that adapts, on a linear network, where one step has a closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from support.derivatives import check_gradient, quick_jit

from capibara_eqx.meta import Task, WithContext, adapt, cavia, only, sgd


RATE, N, D, CONTEXT = 0.3, 4, 3, 2
RNG = np.random.default_rng(0)
POINT = {
    "weight": RNG.standard_normal(D + CONTEXT),
    "x": RNG.standard_normal((N, D)),
    "y": RNG.standard_normal(N),
    "query_x": RNG.standard_normal((5, D)),
    "query_y": RNG.standard_normal(5),
}


class Readout(eqx.Module):
    weight: Array

    def __call__(self, x, *, key=None):
        return x @ self.weight


def loss(learner, batch, *, key=None):
    x, y = batch
    return jnp.mean((learner(x) - y) ** 2)


def oracle(p):
    """`y = w x + v phi`: steps from zero move `phi` along `v`, by the mean error."""
    w, v = p["weight"][:D], p["weight"][D:]
    context = np.zeros(CONTEXT)
    for _ in range(2):
        error = np.mean(p["x"] @ w + v @ context - p["y"])
        context = context - RATE * 2 * error * v
    return float(np.mean((p["query_x"] @ w + v @ context - p["query_y"]) ** 2))


def as_task(arrays):
    return Task(
        support=(arrays["x"], arrays["y"]), query=(arrays["query_x"], arrays["query_y"])
    )


def test_the_network_learns_from_what_the_context_does():
    def value(arrays):
        task_loss = cavia(loss, optimizer=sgd(RATE), steps=2)
        # What the context holds before is nothing to the task.
        learner = WithContext(Readout(arrays["weight"]), jnp.ones(CONTEXT))
        return task_loss(learner, as_task(arrays))

    check_gradient(value, oracle, POINT)


@pytest.mark.slow
def test_outer_gradients_of_the_context_are_zero():
    arrays = {name: jnp.asarray(x, "float32") for name, x in POINT.items()}
    learner = WithContext(Readout(arrays["weight"]), jnp.ones(CONTEXT))
    task_loss = cavia(loss, optimizer=sgd(RATE), steps=2, first_order=True)
    found = quick_jit(jax.grad(task_loss))(learner, as_task(arrays))
    assert not found.context.any()
    assert found.model.weight.all()


@pytest.mark.slow
def test_a_learner_of_ones_own_may_hold_a_context_of_several_arrays():
    class Film(eqx.Module):
        context: dict
        count: int

        def __call__(self, x):
            return x * (1 + self.context["scale"]) + self.context["shift"]

    learner = Film({"scale": jnp.ones(()), "shift": jnp.ones(())}, 3)
    ones = jnp.ones(3)
    task = Task(support=(ones, 2 * ones), query=(ones, ones))
    value = eqx.filter_jit(cavia(loss, optimizer=sgd(0.25), steps=1))(learner, task)
    # The error of -1 moves both by 0.5 from zero: the query of 1 becomes 2.
    np.testing.assert_allclose(value, 1, rtol=1e-6)


@pytest.mark.slow
def test_what_was_adapted_can_be_kept():
    """The context alone moves, and by what the oracle's first step says."""
    arrays = {name: jnp.asarray(x, "float32") for name, x in POINT.items()}
    learner = WithContext.init(Readout(arrays["weight"]), CONTEXT)
    adapted = eqx.filter_jit(adapt)(
        loss,
        learner,
        (arrays["x"], arrays["y"]),
        optimizer=sgd(RATE),
        steps=1,
        where=only(learner, lambda learner: learner.context),
    )
    w, v = POINT["weight"][:D], POINT["weight"][D:]
    moved = -RATE * 2 * np.mean(POINT["x"] @ w - POINT["y"]) * v
    np.testing.assert_allclose(adapted.context, moved, rtol=1e-5)
    assert np.array_equal(adapted.model.weight, arrays["weight"])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_context_is_beside_every_example(batch):
    weight = np.arange(1.0, 6.0, dtype="float32")
    learner = WithContext(Readout(jnp.asarray(weight)), jnp.asarray([0.5, -1.0]))
    x = np.random.default_rng(1).standard_normal((*batch, D)).astype("float32")
    found = learner(jnp.asarray(x))
    assert found.shape == batch
    np.testing.assert_allclose(found, x @ weight[:D] + 2.0 - 5.0, rtol=1e-5)


@pytest.mark.slow
def test_it_takes_models_of_equinox_under_vmap_and_their_keys():
    network = eqx.nn.Sequential(
        [
            eqx.nn.Linear(D + CONTEXT, 4, key=jax.random.key(0)),
            eqx.nn.Dropout(0.5),
        ]
    )
    learner = WithContext.init(network, CONTEXT)
    x, key = jnp.ones((2, D)), jax.random.key(1)
    wide = jnp.concatenate([x, jnp.zeros((2, CONTEXT))], axis=1)
    found = jax.vmap(lambda x: learner(x, key=key))(x)
    expected = jax.vmap(lambda x: network(x, key=key))(wide)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_context_takes_the_type_of_the_input():
    learner = WithContext(Readout(jnp.ones(D + CONTEXT, "bfloat16")), jnp.ones(CONTEXT))
    assert learner(jnp.ones((2, D), "bfloat16")).dtype == jnp.bfloat16
