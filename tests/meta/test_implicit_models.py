"""Implicit gradients of whole models, beside those of a long inner loop unrolled."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import Mamba
from capibara_eqx.meta import (
    Task,
    adapt,
    imaml,
    implicit_adapt,
    meta_value_and_grad,
    sgd,
)


pytestmark = pytest.mark.slow
STRENGTH = 2.0


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def surprise(model, batch, *, key):
    """Of labels, which are integers, after dropout, which takes a key."""
    x, labels = batch
    kept = jax.random.bernoulli(key, 0.7, x.shape)
    logits = jnp.tanh(jnp.where(kept, x, 0) @ model["up"]) @ model["down"]
    logits = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=-1))


def distance(model, batch, *, key):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def classifier():
    model = {"up": draw(0, 3, 4), "down": draw(1, 4, 3)}
    part = lambda seed: (
        draw(seed, 2, 5, 3),
        np.random.default_rng(seed).integers(3, size=(2, 5)),
    )
    return surprise, model, Task(support=part(2), query=part(3))


def mamba():
    layer = filled(Mamba, 2, d_state=2, seed=0, size=0.4)
    part = lambda seed: (draw(seed, 2, 3, 4, 2), draw(seed + 1, 2, 3, 4, 2))
    return distance, layer, Task(support=part(2), query=part(4))


def wide(tree):
    floats, rest = eqx.partition(
        tree, lambda x: eqx.is_array_like(x) and jnp.issubdtype(x.dtype, jnp.floating)
    )
    floats = jax.tree.map(lambda x: jnp.asarray(x, "float64"), floats)
    return eqx.combine(floats, rest)


@pytest.mark.parametrize("case", [classifier, mamba])
def test_a_long_inner_loop_unrolled_has_the_same_gradients(case):
    steps, rate = 120, 0.3
    loss, model, tasks = case()

    def unrolled(start, task, *, key):
        inner_key, query_key = jax.random.split(key)
        start_params = jax.tree.leaves(eqx.filter(start, eqx.is_inexact_array))

        def proximal(model, batch):
            params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
            pairs = zip(params, start_params, strict=True)
            size = sum(jnp.sum((p - q) ** 2) for p, q in pairs)
            return loss(model, batch, key=inner_key) + STRENGTH / 2 * size

        adapted = adapt(
            proximal,
            start,
            task.support,
            optimizer=sgd(rate),
            steps=steps,
            remat="step",
        )
        return loss(adapted, task.query, key=query_key)

    with enable_x64(True):
        model, tasks = wide(model), jax.tree.map(jnp.asarray, wide(tasks))
        implicit = imaml(
            loss,
            strength=STRENGTH,
            optimizer=sgd(rate),
            steps=steps,
            cg_tolerance=1e-13,
        )

        @eqx.filter_jit
        def run(task_loss):
            key = jax.random.key(0)
            return meta_value_and_grad(task_loss, tasks, key=key)(model)

        (value, found), (expected_value, expected) = run(implicit), run(unrolled)
    assert_close(value, expected_value, dtype=np.float64, length=100)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for got, want in pairs:
        assert_close(got, want, dtype=np.float64, length=steps, factor=30)
        assert np.any(want)


def test_memory_does_not_grow_with_the_steps_and_rates_have_no_gradient():
    x = jnp.asarray(draw(0, 64, 32), "float32")
    model = jnp.asarray(0.1 * draw(1, 32, 32), "float32")

    def loss(model, batch, *, key=None):
        return jnp.mean(jnp.tanh(batch @ model) ** 2)

    def compiled(steps):
        def after(arguments):
            model, rate = arguments
            adapted = implicit_adapt(
                loss, model, x, strength=1.0, optimizer=sgd(rate), steps=steps
            )
            return loss(adapted, x)

        arguments = model, jnp.asarray(0.1)
        return jax.jit(jax.grad(after)).lower(arguments).compile(), arguments

    few, arguments = compiled(2)
    many, _ = compiled(64)
    analyses: Any = [few.memory_analysis(), many.memory_analysis()]
    sizes = [analysis.temp_size_in_bytes for analysis in analyses]
    # The loss of every step is checked.
    assert sizes[1] <= sizes[0] + 64 * 16
    gradient, of_rate = few(arguments)
    assert np.any(gradient)
    assert of_rate == 0
