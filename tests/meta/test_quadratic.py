"""Inner loops on quadratics, where every number has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.derivatives import quick_jit
from support.finite_differences import directional_derivative, random_direction
from support.meta_oracle import adam, adapted_loss, descend, quadratic
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.meta import (
    Task,
    WithRates,
    adapt,
    adapt_trajectory,
    maml,
    meta_sgd,
    meta_value_and_grad,
    multi_step_weights,
    safe_adam,
    sgd,
)


SIZE, TASKS = 5, 2
RNG = np.random.default_rng(7)
START = RNG.standard_normal(SIZE)
INNER = [quadratic(SIZE, seed) for seed in range(TASKS)]
OUTER = [quadratic(SIZE, 10 + seed) for seed in range(TASKS)]
# The last coordinate of the third task has no gradient at all, like a dead unit.
DEAD = quadratic(SIZE, 20)
DEAD.curvature[-1, :] = DEAD.curvature[:, -1] = 0

STEPS = 4
LEAF = np.array([0.3, 0.2])
ELEMENT = RNG.uniform(0.05, 0.3, SIZE)
# One a leaf and step; the fourth step takes the last of three.
PER_STEP = np.array([[0.3, 0.1, 0.2], [0.05, 0.25, 0.15]])
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])


def spread(rates):
    """One of leaf `a`, which is two numbers, and one of leaf `b`, which is three."""
    return np.repeat(rates, [2, 3], axis=0)


# The rates of all steps and parameters, and what else there is, by name of the case.
CASES = {
    "plain": ([0.2] * STEPS, {}),
    "first order": ([0.2] * STEPS, {"first_order": True}),
    "multi-step": ([0.2] * STEPS, {"weights": WEIGHTS}),
    # Three segments of two steps, and one step.
    "nested": ([0.2] * 7, {}),
    "per leaf": ([spread(LEAF)] * STEPS, {}),
    "per element": ([ELEMENT] * STEPS, {}),
    "per step": (list(spread(PER_STEP)[:, [0, 1, 2, 2]].T), {}),
    "first order per step": (
        list(spread(PER_STEP)[:, [0, 1, 2, 2]].T),
        {"first_order": True},
    ),
}


def split(vector):
    return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:])}


def joined(tree):
    return np.concatenate([np.asarray(tree["a"]), np.asarray(tree["b"])], axis=-1)


def loss(model, batch, *, key=None):
    curvature, centre = batch
    d = jnp.concatenate([model["a"], model["b"]]) - centre
    return d @ curvature @ d / 2


def batch_of(tasks):
    return tuple(jnp.asarray(np.stack(parts)) for parts in zip(*tasks, strict=True))


@functools.cache
def found():
    """All of what these tests look at, in one compilation."""

    def compute(model, tasks, dead):
        def outer(task_loss, learner):
            return meta_value_and_grad(task_loss, tasks)(learner)

        def rated(rates, **options):
            task_loss = meta_sgd(loss, steps=STEPS, **options)
            return outer(task_loss, WithRates(model, rates))

        how = {"optimizer": sgd(0.2), "steps": STEPS}
        per_step = {"a": jnp.asarray(PER_STEP[0]), "b": jnp.asarray(PER_STEP[1])}
        first = {"per_step": True, "first_order": True}
        gradients = {
            "plain": outer(maml(loss, **how), model),
            "first order": outer(maml(loss, **how, first_order=True), model),
            "nested": outer(
                maml(loss, optimizer=sgd(0.2), steps=7, remat="nested"), model
            ),
            "multi-step": outer(
                maml(loss, **how, step_weights=jnp.asarray(WEIGHTS)), model
            ),
            "per leaf": rated({"a": jnp.asarray(LEAF[0]), "b": jnp.asarray(LEAF[1])}),
            "per element": rated(split(ELEMENT)),
            "per step": rated(per_step, per_step=True),
            "first order per step": rated(per_step, **first),
        }
        support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
        query = jax.tree.map(lambda leaf: leaf[0], tasks.query)

        def to_support(support, first_order=False):
            task_loss = maml(loss, **how, first_order=first_order)
            return task_loss(model, Task(support, query))

        def after_adam(model):
            adapted = adapt(loss, model, dead, optimizer=safe_adam(0.1), steps=3)
            return loss(adapted, query), adapted

        momentum = optax.sgd(0.2, momentum=0.9)
        return gradients, {
            "to support": jax.grad(to_support)(support),
            "not to support": jax.grad(to_support)(support, True),
            "path": adapt_trajectory(loss, model, support, **how),
            "adapted": adapt(loss, model, support, **how),
            "no steps": adapt(loss, model, support, optimizer=sgd(0.2), steps=0),
            "momentum": adapt(loss, model, support, optimizer=momentum, steps=STEPS),
            "adam": jax.grad(after_adam, has_aux=True)(model),
        }

    with enable_x64(True):
        tasks = Task(batch_of(INNER), batch_of(OUTER))
        dead = tuple(jnp.asarray(part) for part in DEAD)
        return jax.tree.map(np.asarray, quick_jit(compute)(split(START), tasks, dead))


@pytest.mark.parametrize("name", CASES)
def test_outer_gradients_at_the_start_and_at_rates(name):
    value, gradient = found()[0][name]
    rates, options = CASES[name]
    expected = [
        adapted_loss(inner, outer, START, rates, **options)
        for inner, outer in zip(INNER, OUTER, strict=True)
    ]
    want, at_start, at_rates = (
        np.mean(np.stack(parts), axis=0) for parts in zip(*expected, strict=True)
    )
    assert_close(value, want, dtype="float64", length=50)
    is_rated = isinstance(gradient, WithRates)
    model = gradient.model if is_rated else gradient
    assert_close(joined(model), at_start, dtype="float64", length=50)
    if name == "per element":
        assert_close(
            joined(gradient.rates), at_rates.sum(0), dtype="float64", length=50
        )
    elif is_rated:
        leaves = np.stack([at_rates[:, :2].sum(1), at_rates[:, 2:].sum(1)])
        if name == "per leaf":
            leaves = leaves.sum(1)
        else:
            leaves = np.stack([*leaves[:, :2].T, leaves[:, 2:].sum(1)], axis=1)
        got = np.stack([gradient.rates["a"], gradient.rates["b"]])
        assert_close(got, leaves, dtype="float64", length=50)


def test_the_path_and_its_ends():
    results = found()[1]
    want = descend(INNER[0], START, [0.2] * STEPS)
    assert_close(joined(results["path"]), want[1:], dtype="float64", length=50)
    np.testing.assert_array_equal(
        joined(results["adapted"]), joined(results["path"])[-1]
    )
    np.testing.assert_array_equal(joined(results["no steps"]), START)
    # In one product: c + (I - a H)^K (theta - c).
    factor = np.linalg.matrix_power(np.eye(SIZE) - 0.2 * INNER[0].curvature, STEPS)
    closed = INNER[0].centre + factor @ (START - INNER[0].centre)
    assert_close(joined(results["adapted"]), closed, dtype="float64", length=50)


def test_a_closed_form_of_the_meta_gradient():
    # The two tasks in one product each, (I - a H)^K g.
    wanted = []
    for inner, outer in zip(INNER, OUTER, strict=True):
        factor = np.linalg.matrix_power(np.eye(SIZE) - 0.2 * inner.curvature, STEPS)
        end = inner.centre + factor @ (START - inner.centre)
        wanted.append(factor @ outer.slope(end))
    _, gradient = found()[0]["plain"]
    assert_close(joined(gradient), np.mean(wanted, 0), dtype="float64", length=50)


def test_gradients_reach_the_support_set():
    # The end is c + P (theta - c), so that the centre is moved by I - P.
    factor = np.linalg.matrix_power(np.eye(SIZE) - 0.2 * INNER[0].curvature, STEPS)
    end = INNER[0].centre + factor @ (START - INNER[0].centre)
    want = (np.eye(SIZE) - factor) @ OUTER[0].slope(end)
    _, centre = found()[1]["to support"]
    assert_close(centre, want, dtype="float64", length=50)
    # Inner gradients of the first order are constants, whatever they depend on.
    for gradient in found()[1]["not to support"]:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_momentum_is_carried_over_the_steps():
    p, velocity = START, np.zeros(SIZE)
    for _ in range(STEPS):
        velocity = 0.9 * velocity + INNER[0].slope(p)
        p = p - 0.2 * velocity
    assert_close(joined(found()[1]["momentum"]), p, dtype="float64", length=50)


def test_adam_where_a_gradient_is_zero():
    gradient, adapted = found()[1]["adam"]
    end = adam(DEAD, START, 0.1, 3, 1e-8)
    assert end[-1] == START[-1]
    assert_close(joined(adapted), end, dtype="float64", length=50)

    def outer(point):
        return OUTER[0].value(adam(DEAD, point["p"], 0.1, 3, 1e-8))

    for seed in range(3):
        direction = random_direction({"p": START}, ["p"], np.random.default_rng(seed))
        want = directional_derivative(outer, {"p": START}, direction)
        assert want.bound < 1e-8
        got = joined(gradient) @ direction["p"]
        assert abs(got - want.value) < 1e-8


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_weights_of_steps_anneal_to_the_last(progress):
    weights = np.asarray(multi_step_weights(5, progress), "float64")
    share = max((1 - progress) / 5, 0.03 / 5)
    want = np.array([*[share] * 4, 1 - 4 * share])
    assert_close(weights, want, dtype="float32")
