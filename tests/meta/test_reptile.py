"""Reptile beside its gradients on quadratics: parts, types, the outer loop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capibara_eqx.meta import (
    Task,
    adapt,
    init_meta_state,
    make_meta_step,
    meta_value_and_grad,
    only,
    reptile,
    sgd,
)


def loss(model, batch, *, key=None):
    x, y = batch
    return jnp.mean((x @ model["body"].astype("float32") @ model["head"] - y) ** 2)


def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), "float32")
    model = {"body": draw(3, 2).astype("bfloat16"), "head": draw(2), "name": len}
    return model, Task(support=(draw(2, 4, 3), draw(2, 4)), query=None)


@pytest.mark.slow
def test_a_part_adapts_and_types_stay():
    model, tasks = problem()
    head = only(model, lambda model: model["head"])
    task_loss = reptile(loss, optimizer=sgd(0.1), steps=2, where=head)

    @eqx.filter_jit
    def run(model, tasks):
        ends = jax.vmap(
            lambda support: adapt(
                loss, model, support, optimizer=sgd(0.1), steps=2, where=head
            )["head"]
        )(tasks.support)
        return meta_value_and_grad(task_loss, tasks)(model), ends

    (value, gradients), ends = run(model, tasks)
    distance = np.asarray(model["head"]) - np.asarray(ends)
    np.testing.assert_allclose(value, (distance**2).sum(1).mean() / 2, rtol=1e-5)
    np.testing.assert_allclose(gradients["head"], distance.mean(0), rtol=1e-4)
    assert gradients["body"].dtype == jnp.bfloat16
    assert not np.asarray(gradients["body"], "float32").any()


@pytest.mark.slow
def test_an_outer_step_of_one_goes_all_the_way():
    """With a rate of one, one task and SGD, the model becomes the adapted one."""
    model, tasks = problem()
    model = {**model, "body": model["body"].astype("float32")}
    tasks = jax.tree.map(lambda x: x[:1], tasks)
    optimizer = optax.sgd(1.0)
    step = make_meta_step(optimizer, reptile(loss, optimizer=sgd(0.1), steps=3))
    state, _ = step(init_meta_state(model, optimizer), tasks)
    first = jax.tree.map(lambda x: x[0], tasks.support)
    adapted = eqx.filter_jit(adapt)(loss, model, first, optimizer=sgd(0.1), steps=3)
    for name in ("body", "head"):
        np.testing.assert_allclose(state.model[name], adapted[name], rtol=1e-5)
