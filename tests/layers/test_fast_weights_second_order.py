"""MAML and Hessians through layers of fast weights, against their NumPy loops."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import fast_weight_oracle as oracle
from support.derivatives import check_second_order, quick_jit
from support.finite_differences import directional_derivative, random_direction
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import DIFFERENCE_TOLERANCES

from capibara_eqx.layers import DeltaNet, MetaLinearAttention
from capibara_eqx.meta import (
    Task,
    init_meta_state,
    make_meta_step,
    maml,
    meta_value_and_grad,
    sgd,
)


pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {"d_conv": 2, "norm_eps": 0.5, "chunk_size": 2}
LAYERS = {
    "delta": (DeltaNet, oracle.delta_net_row, {"head_dim": 2, "conv_bias": True}),
    "delta_gated": (
        DeltaNet,
        oracle.delta_net_row,
        {"head_dim": 2, "conv_bias": True, "gated": True, "output_gate": True},
    ),
    "meta": (
        MetaLinearAttention,
        oracle.meta_linear_row,
        {"head_dim": 2, "v_head_dim": 2},
    ),
}
RATE, SEQ = 0.3, 5
each = pytest.mark.parametrize("name", LAYERS)


@functools.cache
def make(name):
    layer, _, options = LAYERS[name]
    built = filled(layer, 2, 1, **OPTIONS, **options, seed=0, size=0.7)
    if options.get("conv_bias"):
        # Keys of order one: the derivatives of their directions are, too.
        built = eqx.tree_at(lambda m: m.conv.bias, built, replace_fn=lambda b: b + 2.0)
    return built


def examples():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 2, SEQ, 2))  # support and query; input and target


def loss(layer, batch, *, key=None):
    x, y = map(jnp.asarray, batch)
    return jnp.mean((layer(x) - y) ** 2)


def loss_by_loop(name, layer, point, batch):
    x, y = batch
    found, _ = LAYERS[name][1](point, x, oracle.settings(layer))
    return np.mean((found - y) ** 2)


def parameters_of(layer):
    found = oracle.parameters(layer).items()
    return {name: value.astype("float64") for name, value in found}


@each
def test_hessians(name):
    """Both modes over reverse."""
    layer, (batch, _) = make(name), examples()
    check_second_order(
        lambda point: loss(oracle.with_parameters(layer, point), batch),
        lambda point: loss_by_loop(name, layer, point, batch),
        parameters_of(layer),
    )


@each
def test_the_gradient_of_maml(name):
    """Of the loss after a step, whose own gradient the oracle knows by differences."""
    layer, (support, query) = make(name), examples()
    point = parameters_of(layer)

    def gradient(point):
        """Of the loops, by central differences in every parameter."""
        found = {}
        for key, value in point.items():
            slope = np.zeros(value.shape)
            for index in np.ndindex(value.shape):
                one = np.zeros(value.shape)
                one[index] = 1.0
                moved_to = functools.partial(loss_by_loop, name, layer, batch=support)
                at = directional_derivative(moved_to, point, {key: one})
                slope[index] = at.value
            found[key] = slope
        return found

    def after_a_step(point):
        slope = gradient(point)
        adapted = {key: point[key] - RATE * slope[key] for key in point}
        return loss_by_loop(name, layer, adapted, query)

    with enable_x64(True):
        tasks = Task(*(tuple(map(jnp.asarray, part[:, None])) for part in examples()))
        wide = oracle.with_parameters(
            layer, {key: jnp.asarray(value) for key, value in point.items()}
        )
        task_loss = maml(loss, optimizer=sgd(RATE), steps=1)
        of = lambda params: oracle.with_parameters(wide, params)
        one = jax.tree.map(lambda leaf: leaf[0], tasks)
        run = quick_jit(
            lambda params: meta_value_and_grad(task_loss, tasks)(of(params))
        )
        forward = quick_jit(
            lambda params, by: jax.jvp(
                lambda params: task_loss(of(params), one), (params,), (by,)
            )
        )
        value, grads = run(point)
        found = oracle.parameters(grads)
    np.testing.assert_allclose(value, after_a_step(point), rtol=1e-10)
    rng = np.random.default_rng(2)
    for _ in range(2):
        direction = random_direction(point, list(point), rng)
        got = sum(np.sum(found[key] * direction[key]) for key in point)
        want = directional_derivative(after_a_step, point, direction)
        # Its function is itself a difference.
        allowed = DIFFERENCE_TOLERANCES[2] * want.scale
        assert want.bound < allowed
        assert abs(got - want.value) < allowed
        with enable_x64(True):
            by = {key: jnp.asarray(direction[key]) for key in point}
            _, tangent = forward(point, by)
        np.testing.assert_allclose(tangent, got, rtol=1e-10)
    assert all(np.any(found[key] != 0) for key in point)


@each
def test_meta_training_finds_what_one_step_adapts(name):
    """To a map that each task draws anew: no one layer is right for all of them."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 8, SEQ, 2))
    y = np.einsum("pnsi,nij->pnsj", x, rng.standard_normal((8, 2, 2)))
    x, y = x.astype("float32"), y.astype("float32")
    tasks = Task(*((jnp.asarray(x[part]), jnp.asarray(y[part])) for part in (0, 1)))
    layer, optimizer = make(name), optax.adam(0.03)
    task_loss = maml(loss, optimizer=sgd(RATE), steps=1, remat="step")

    step = make_meta_step(optimizer, task_loss)
    state, values = init_meta_state(layer, optimizer), []
    for _ in range(100):
        state, value = step(state, tasks)
        values.append(float(value))
    assert np.all(np.isfinite(values))
    assert np.min(values[-10:]) < 0.8 * values[0]
