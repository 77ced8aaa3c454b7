"""Meta-SGD finds the best rate for linear tasks, which is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support.precision import enable_x64

from capibara_eqx.meta import (
    Task,
    WithRates,
    init_meta_state,
    make_meta_step,
    meta_sgd,
    only,
)


TASKS, N, D = 1024, 10, 5


def loss(model, batch, *, key=None):
    x, y = batch
    return jnp.mean((x @ model - y) ** 2) / 2


def test_a_learned_rate_is_n_over_n_plus_d_plus_one():
    """Tasks y = w x with w, x ~ N(0, I): one step from zero on N examples.

    The query is the d unit vectors, on which the loss is |w - w_1|^2 / (2 d). That is a
    quadratic in the rate r, (|w|^2 - 2 r w'Sw + r^2 w'SSw) / (2 d) with S = X'X / N, so
    that gradient descent with the inverse of its mean curvature is there in few steps.
    Intervals are five standard errors over the tasks.
    """
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((TASKS, D)), rng.standard_normal((TASKS, N, D))
    moved = np.einsum("tni,tnj,tj->ti", x, x, w) / N
    along, square = np.sum(w * moved, axis=1), np.sum(moved**2, axis=1)
    best = N / (N + D + 1)

    with enable_x64(True):
        support = (x, np.einsum("tnd,td->tn", x, w))
        query = (np.broadcast_to(np.eye(D), (TASKS, D, D)), w)
        tasks = jax.tree.map(jnp.asarray, Task(support, query))
        learner = WithRates(jnp.zeros(D), jnp.asarray(0.1))
        # The mean curvature is E w'SSw / d = (N + d + 1) / N.
        optimizer = optax.sgd(best)
        rates = only(learner, lambda learner: learner.rates)
        step = make_meta_step(optimizer, meta_sgd(loss, steps=1), where=rates)
        state = init_meta_state(learner, optimizer, where=rates)
        for _ in range(12):
            state, value = step(state, tasks)
        rate = float(state.model.rates)

    assert abs(rate - along.mean() / square.mean()) < 1e-12
    error = np.std(along - best * square) / np.sqrt(TASKS) / square.mean()
    assert abs(rate - best) < 5 * error < 0.06
    distances = np.sum((w - rate * moved) ** 2, axis=1)
    assert abs(2 * D * float(value) - distances.mean()) < 1e-12
    error = np.std(distances) / np.sqrt(TASKS)
    assert abs(distances.mean() - D * (D + 1) / (N + D + 1)) < 5 * error < 0.4
    assert not np.any(state.model.model)
