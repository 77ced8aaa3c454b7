"""Regression of sines from ten points, the first experiment of Finn et al."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara_eqx.meta import (
    Task,
    init_meta_state,
    make_meta_step,
    maml,
    sgd,
)


def loss(model, batch, *, key=None):
    x, y = batch
    for weight, bias in model[:-1]:
        x = jnp.tanh(x @ weight + bias[None])
    weight, bias = model[-1]
    return jnp.mean((x @ weight + bias[None] - y) ** 2)


def draw(rng, count):
    """Sines of any size and phase, ten points each to learn from and to be judged."""
    amplitude = rng.uniform(0.1, 5, (count, 1, 1))
    phase = rng.uniform(0, np.pi, (count, 1, 1))
    x = rng.uniform(-5, 5, (count, 20, 1))
    x, y = (part.astype("float32") for part in (x, amplitude * np.sin(x - phase)))
    return Task((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))


def network(rng, width=20):
    sizes = [1, width, width, 1]
    return [
        (
            jnp.asarray(rng.standard_normal(shape) * np.sqrt(1 / shape[0]), "float32"),
            jnp.zeros(shape[1]),
        )
        for shape in zip(sizes[:-1], sizes[1:], strict=True)
    ]


def test_maml_learns_to_learn_sines():
    rng = np.random.default_rng(0)
    optimizer = optax.adam(2e-2)
    step = make_meta_step(optimizer, maml(loss, optimizer=sgd(0.03), steps=1))
    state = init_meta_state(network(rng), optimizer)
    values = []
    for _ in range(200):
        state, value = step(state, draw(rng, 25))
        values.append(float(value))
    # No single curve is much better than zero, whose error is the mean square of the
    # sines, about 4.4: one step from ten points is what makes the difference.
    tasks = draw(rng, 400)
    query = jax.tree.map(lambda leaf: leaf.reshape(-1, 1), tasks.query)
    without = loss(state.model, query)
    assert np.mean(values[:5]) > 3.5
    assert np.mean(values[-50:]) < 1.5
    assert float(without) > 3
