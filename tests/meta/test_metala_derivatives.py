"""Outer derivatives of meta-learning attention, against differences of NumPy loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import check_first_order, check_second_order
from support.metala_oracle import (
    fast_adapt,
    small_layer,
    small_task,
    weights_of,
    with_weights,
)


def problem(method: str, targets: str, steps: int):
    """The query loss as a function of all parameters and of the examples."""
    layer = small_layer(method, 1, d_model=2, adaptation_steps=steps)
    x, y, query = small_task(targets, 2, d_model=2, n=3, seq=2)
    point = weights_of(layer) | {"support_x": x, "query_x": query}
    labels = np.issubdtype(y.dtype, np.integer)
    if not labels:
        point["support_y"] = y
    goal = np.random.default_rng(3).standard_normal(
        (2, 3, 3) if "step" in targets else (2, 3)
    )

    def loss(numpy, predictions):
        return numpy.mean((predictions - goal) ** 2)

    def function(p):
        support_y = jnp.asarray(y, "int32") if labels else p["support_y"]
        moved = with_weights(layer, p)
        return loss(jnp, moved.fast_adapt(p["support_x"], support_y, p["query_x"]))

    def oracle(p):
        support_y = y if labels else p["support_y"]
        args = (p["support_x"], support_y, p["query_x"])
        return float(loss(np, fast_adapt(layer, p, *args)))

    return function, oracle, point


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "targets", "steps"),
    [
        ("anil", "step", 3),
        ("anil", "label", 3),
        ("ridge", "step", 0),
        ("ridge", "label", 0),
        ("maml", "sequence", 1),
        ("maml", "label a step", 2),
    ],
)
def test_meta_gradients(method, targets, steps):
    """Of encoder, start, rate or penalty and scale, and of the examples themselves."""
    check_first_order(*problem(method, targets, steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "targets", "steps"),
    [("anil", "label", 2), ("ridge", "label", 0), ("maml", "sequence", 1)],
)
def test_second_meta_derivatives(method, targets, steps):
    check_second_order(*problem(method, targets, steps))


@pytest.mark.slow
def test_gradients_of_zero_input_are_finite():
    zeros = jnp.zeros((3, 2, 4))
    for method in ("maml", "anil", "ridge"):
        layer = small_layer(method, 1)
        grads = eqx.filter_jit(eqx.filter_grad(query_loss))(layer, zeros)
        leaves = jax.tree.leaves(grads)
        assert len(leaves) == (15 if method == "ridge" else 14)
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def query_loss(layer, x):
    return jnp.mean((layer.fast_adapt(x, jnp.ones((3, 2, 3)), x) - 1) ** 2)
