"""Tasks as a batch axis, and the step of the outer loop."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.derivatives import quick_jit
from support.tolerances import assert_close

from capibara_eqx.meta import (
    Task,
    adapt,
    init_meta_state,
    make_meta_step,
    maml,
    meta_value_and_grad,
    only,
    sgd,
)


TASKS, SHOTS = 3, 3
INNER = sgd(0.2)
seeds = st.integers(0, 2**16)


def loss(model, batch, *, key=None):
    x, y = batch
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
    return jnp.mean((jnp.tanh(x @ model["w"]) @ model["v"] - y) ** 2)


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def draw(seed, shape=(TASKS,)) -> tuple[Any, Task]:
    model = {"w": random((2, 3), seed), "v": random(3, seed + 1)}
    x, y = random((2, *shape, SHOTS, 2), seed + 2), random((2, *shape, SHOTS), seed + 3)
    return model, Task((x[0], y[0]), (x[1], y[1]))


TASK_LOSS = maml(loss, optimizer=INNER, steps=2)


@quick_jit
def outer(model, tasks):
    return meta_value_and_grad(TASK_LOSS, tasks)(model)


@quick_jit
def alone(model, task):
    """Written out for one task, without a loop."""

    def after(model):
        for _ in range(2):
            grads = jax.grad(loss)(model, task.support)
            model = jax.tree.map(lambda p, g: p - 0.2 * g, model, grads)
        return loss(model, task.query)

    return jax.value_and_grad(after)(model)


def assert_trees_close(got, want, length=SHOTS * TASKS):
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for left, right in leaves:
        assert_close(left, right, dtype="float32", length=length, terms=1)


@settings(max_examples=50)
@given(seed=seeds)
def test_a_batch_of_tasks_is_a_loop_over_them(seed):
    model, tasks = draw(seed)
    one = lambda i: jax.tree.map(lambda leaf: leaf[i], tasks)
    each = [alone(model, one(i)) for i in range(TASKS)]
    mean = jax.tree.map(lambda *parts: np.mean(np.stack(parts), axis=0), *each)
    assert_trees_close(outer(model, tasks), mean)


@settings(max_examples=50)
@given(seed=seeds, order=st.permutations(range(TASKS)))
def test_the_order_of_tasks_is_nothing(seed, order):
    model, tasks = draw(seed)
    shuffled = jax.tree.map(lambda leaf: np.asarray(leaf)[order], tasks)
    assert_trees_close(outer(model, shuffled), outer(model, tasks))


@functools.cache
def adapt_by(steps: int):
    return jax.jit(
        lambda model, batch: adapt(loss, model, batch, optimizer=INNER, steps=steps)
    )


@pytest.mark.slow
@settings(max_examples=50)
@given(seed=seeds, k=st.integers(0, 4), m=st.integers(0, 4))
def test_more_steps_go_on_where_fewer_end(seed, k, m):
    model, task = draw(seed, ())
    middle = adapt_by(k)(model, task.support)
    assert_trees_close(
        adapt_by(m)(middle, task.support), adapt_by(k + m)(model, task.support)
    )


@eqx.filter_jit
def adapt_one(model, batch, name):
    where = only(model, lambda model: model[name])
    return adapt(loss, model, batch, optimizer=INNER, steps=2, where=where)


@pytest.mark.slow
@settings(max_examples=50)
@given(seed=seeds, name=st.sampled_from("wv"))
def test_what_does_not_adapt_stays_to_the_bit(seed, name):
    model, task = draw(seed, ())
    moved = adapt_one(model, task.support, name)
    (other,) = set(model) - {name}
    np.testing.assert_array_equal(moved[other], model[other])
    assert np.any(np.asarray(moved[name]) != np.asarray(model[name]))


def test_a_step_of_the_outer_loop():
    model, tasks = draw(0)
    head = only(model, lambda model: model["v"])
    optimizer = optax.sgd(0.1)
    seen = []

    def task_loss(model, task, *, key):
        seen.append(key.dtype)
        return TASK_LOSS(model, task), jax.random.uniform(key)

    step = make_meta_step(optimizer, task_loss, where=head, has_aux=True)
    state = init_meta_state(model, optimizer, where=head)
    key = jax.random.key(0)
    state, (value, aux) = step(state, tasks, key)
    want, gradient = outer(model, tasks)
    assert_close(value, want, dtype="float32", length=TASKS)
    assert_close(
        state.model["v"], model["v"] - 0.1 * gradient["v"], dtype="float32", length=9
    )
    np.testing.assert_array_equal(state.model["w"], model["w"])
    assert int(state.step) == 1
    # A key for every task, others with another key, and no second compilation.
    assert len(np.unique(aux)) == TASKS
    _, (_, again) = step(state, tasks, key)
    np.testing.assert_array_equal(aux, again)
    state, (_, other) = step(state, tasks, jax.random.key(1))
    assert not np.any(np.asarray(aux) == np.asarray(other))
    assert int(state.step) == 2
    assert len(seen) == 1


@pytest.mark.slow
def test_outer_optimisers_that_look_at_the_loss():
    model, tasks = draw(1)
    value, gradient = outer(model, tasks)
    norm = sum(np.sum(np.asarray(g, "float64") ** 2) for g in jax.tree.leaves(gradient))
    polyak = optax.polyak_sgd(max_learning_rate=100.0)
    step = make_meta_step(polyak, TASK_LOSS)
    state, _ = step(init_meta_state(model, polyak), tasks)
    want = jax.tree.map(lambda p, g: p - float(value) / norm * g, model, gradient)
    assert_trees_close(state.model, want)
    search = optax.lbfgs()
    step = make_meta_step(search, TASK_LOSS)
    state = init_meta_state(model, search)
    for _ in range(5):
        state, last = step(state, tasks)
    assert float(last) < float(value)


@pytest.mark.slow
def test_complex_models_go_down():
    centre = np.asarray([1 + 2j, -3j], "complex64")

    def distance(z, task):
        return jnp.sum(jnp.abs(z - task) ** 2)

    optimizer = optax.sgd(0.25)
    step = make_meta_step(optimizer, distance)
    start = jnp.zeros(2, "complex64")
    state, _ = step(init_meta_state(start, optimizer), jnp.asarray([centre, centre]))
    assert_close(state.model, centre / 2, dtype="complex64")


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_tasks_on_several_devices(axis_type):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("tasks",), axis_types=(axis_type,))
    model, tasks = draw(2, (16,))
    optimizer = optax.adam(1e-2)
    step = make_meta_step(optimizer, TASK_LOSS)
    state = init_meta_state(model, optimizer)
    key = jax.random.key(0)

    @jax.jit
    def differentiate(model, tasks, key):
        return meta_value_and_grad(TASK_LOSS, tasks, key=key)(model)

    def run(state, tasks, key):
        return differentiate(state.model, tasks, key), step(state, tasks)

    want = run(state, tasks, key)
    with jax.set_mesh(mesh):
        apart = jax.device_put(tasks, NamedSharding(mesh, P("tasks")))
        whole = jax.device_put((state, key), NamedSharding(mesh, P()))
        got = run(whole[0], apart, whole[1])
    assert_trees_close(got, want)
