"""Outer gradients of every method where the inner loss is a quadratic.

The parameters are one vector p, a batch is (H, b), its loss p' H p / 2 + b' p. All that
the methods compute is then a product of matrices, done here in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.derivatives import quick_jit
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.meta import (
    Task,
    imaml,
    implicit_adapt,
    maml,
    meta_value_and_grad,
    reptile,
    sgd,
)


D, TASKS, STEPS, STRENGTH = 5, 3, 3, 0.7
RATES = np.array([0.11, 0.05, 0.2])
RNG = np.random.default_rng(0)


def loss(p, batch, *, key=None):
    H, b = batch
    return p @ H @ p / 2 + b @ p


def matrices(count):
    roots = RNG.standard_normal((count, D, D))
    return roots @ roots.transpose(0, 2, 1) / D + 0.1 * np.eye(D)


START = RNG.standard_normal(D)
SUPPORT = (matrices(TASKS), RNG.standard_normal((TASKS, D)))
QUERY = (matrices(TASKS), RNG.standard_normal((TASKS, D)))
LINEAR = (np.zeros((TASKS, D, D)), SUPPORT[1])


def descent(H, b, rates):
    """Where gradient descent ends, and the derivative of that in the start."""
    p, jacobian = START, np.eye(D)
    for rate in rates:
        p = p - rate * (H @ p + b)
        jacobian = (np.eye(D) - rate * H) @ jacobian
    return p, jacobian


def mean_gradient(inner, support, first_order=False):
    """The mean over tasks of J' (H p + b) at the adapted p, of the query's H and b."""
    total = np.zeros(D)
    for H, b, query_H, query_b in zip(*support, *QUERY, strict=True):
        p, jacobian = inner(H, b)
        slope = query_H @ p + query_b
        total += slope if first_order else jacobian.T @ slope
    return total / TASKS


def proximal_minimum(H, b):
    system = np.linalg.inv(H + STRENGTH * np.eye(D))
    return system @ (STRENGTH * START - b), STRENGTH * system


one_rate = functools.partial(descent, rates=[0.1] * STEPS)
every_rate = functools.partial(descent, rates=RATES)
METHODS = {
    "maml": lambda: maml(loss, optimizer=sgd(0.1), steps=STEPS),
    "rates": lambda: maml(
        loss, optimizer=sgd(jnp.asarray(RATES), per_step=True), steps=STEPS
    ),
    "first order": lambda: maml(
        loss, optimizer=sgd(0.1), steps=STEPS, first_order=True
    ),
    "no step": lambda: maml(loss, optimizer=sgd(0.1), steps=0),
    # Two paths to the same minimum. The rate is below 2 over the largest eigenvalue.
    "imaml": lambda: imaml(
        loss, strength=STRENGTH, optimizer=sgd(0.25), steps=400, cg_tolerance=1e-13
    ),
    "imaml momentum": lambda: imaml(
        loss,
        strength=STRENGTH,
        optimizer=optax.sgd(0.2, momentum=0.6),
        steps=400,
        cg_tolerance=1e-13,
    ),
    "reptile": lambda: reptile(loss, optimizer=sgd(0.1), steps=1),
    "reptile steps": lambda: reptile(loss, optimizer=sgd(0.1), steps=STEPS),
}


@pytest.fixture(scope="module")
def gradients():
    """Of all methods, and on linear tasks, in one program."""
    with enable_x64(True):
        tasks = jax.tree.map(jnp.asarray, Task(SUPPORT, QUERY))
        linear = jax.tree.map(jnp.asarray, Task(LINEAR, QUERY))

        @quick_jit
        def run(start):
            found = {
                name: meta_value_and_grad(method(), tasks)(start)[1]
                for name, method in METHODS.items()
            }
            for name in ("maml", "first order"):
                method = METHODS[name]()
                found[f"linear {name}"] = meta_value_and_grad(method, linear)(start)[1]
            return found

        return jax.tree.map(np.asarray, run(jnp.asarray(START)))


def check(found, expected):
    # 400 steps towards a minimum of condition number below 10.
    assert_close(found, expected, dtype=np.float64, length=100)


def test_maml_is_the_product_of_the_steps(gradients):
    check(gradients["maml"], mean_gradient(one_rate, SUPPORT))
    check(gradients["rates"], mean_gradient(every_rate, SUPPORT))


def test_first_order_is_the_gradient_at_the_end(gradients):
    check(gradients["first order"], mean_gradient(one_rate, SUPPORT, True))


def test_first_order_is_maml_where_the_inner_loss_is_linear(gradients):
    check(gradients["linear maml"], mean_gradient(one_rate, LINEAR))
    check(gradients["linear first order"], gradients["linear maml"])


def test_without_a_step_it_is_the_query_alone(gradients):
    check(gradients["no step"], mean_gradient(lambda H, b: (START, np.eye(D)), SUPPORT))


@pytest.mark.parametrize("name", ["imaml", "imaml momentum"])
def test_imaml_is_one_linear_system_whatever_the_path(gradients, name):
    check(gradients[name], mean_gradient(proximal_minimum, SUPPORT))


def test_reptile_with_one_step_is_training_on_all_tasks_at_once(gradients):
    H, b = (part.mean(axis=0) for part in SUPPORT)
    check(gradients["reptile"], 0.1 * (H @ START + b))


def test_reptile_points_away_from_where_the_tasks_lead(gradients):
    ends = [one_rate(H, b)[0] for H, b in zip(*SUPPORT, strict=True)]
    check(gradients["reptile steps"], START - np.mean(ends, axis=0))


@pytest.mark.slow
def test_imaml_in_float32():
    """Conjugate gradients stop at 1e-5 of the right hand side."""
    tasks = jax.tree.map(lambda x: jnp.asarray(x, "float32"), Task(SUPPORT, QUERY))
    method = imaml(loss, strength=STRENGTH, optimizer=sgd(0.25), steps=100)
    run = jax.jit(lambda start: meta_value_and_grad(method, tasks)(start)[1])
    found = run(jnp.asarray(START, "float32"))
    expected = mean_gradient(proximal_minimum, SUPPORT)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def truncated(system, right, steps):
    """Conjugate gradients from zero, as in any textbook."""
    x, r = np.zeros_like(right), right
    p = r
    for _ in range(steps):
        step = r @ r / (p @ system @ p)
        x = x + step * p
        new = r - step * system @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


@pytest.mark.slow
@pytest.mark.parametrize("cg_steps", [1, 2, 4])
def test_few_steps_of_conjugate_gradients_are_taken_as_they_are(cg_steps):
    H, b = (part[0] for part in SUPPORT)
    p, _ = proximal_minimum(H, b)
    direction = RNG.standard_normal(D)

    def along(start):
        p = implicit_adapt(
            loss,
            start,
            (jnp.asarray(H), jnp.asarray(b)),
            strength=STRENGTH,
            optimizer=sgd(0.25),
            steps=400,
            cg_steps=cg_steps,
            cg_tolerance=1e-14,
        )
        return jnp.asarray(direction) @ p, p

    with enable_x64(True):
        run = jax.jit(jax.grad(along, has_aux=True))
        found, adapted = run(jnp.asarray(START))
        check(adapted, p)
        system = np.eye(D) + H / STRENGTH
        check(found, truncated(system, direction, cg_steps))
