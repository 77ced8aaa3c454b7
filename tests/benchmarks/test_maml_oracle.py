"""The oracle of meta-gradients against differences of its own loss, in float64."""

import numpy as np
import pytest

from benchmarks import _maml_oracle


@pytest.mark.parametrize(("activation", "steps"), [("relu", 1), ("tanh", 3)])
def test_the_gradient_is_that_of_the_loss(activation, steps):
    rng = np.random.default_rng(0)
    sizes = ((4, 2), (3, 4), (2, 3))
    weights = [(rng.normal(size=s), rng.normal(size=s[0])) for s in sizes]
    tasks = tuple(rng.normal(size=(2, 5, 2)) for _ in range(4))

    def moved(step, direction):
        params = iter(direction)
        return [(w + step * next(params), b + step * next(params)) for w, b in weights]

    direction = [rng.normal(size=a.shape) for pair in weights for a in pair]
    ask = (tasks, 0.05, steps, activation)
    _, gradients = _maml_oracle.maml(weights, *ask)
    h = 1e-5
    ends = [_maml_oracle.maml(moved(s, direction), *ask)[0] for s in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    products = zip(gradients, direction, strict=True)
    expected = sum(np.sum(g * d) for g, d in products)
    np.testing.assert_allclose(slope, expected, rtol=1e-7)


def test_no_inner_step_is_the_gradient_of_the_query():
    rng = np.random.default_rng(1)
    weights = [(rng.normal(size=(1, 3)), rng.normal(size=1))]
    x, y, x_query, y_query = (rng.normal(size=(1, 4, d)) for d in (3, 1, 3, 1))
    _, (weight, bias) = _maml_oracle.maml(
        weights, (x, y, x_query, y_query), 0.1, 0, "relu"
    )
    difference = x_query[0] @ weights[0][0].T + weights[0][1] - y_query[0]
    np.testing.assert_allclose(weight, difference.T @ x_query[0] / 2, rtol=1e-12)
    np.testing.assert_allclose(bias, difference.mean(axis=0) * 2, rtol=1e-12)
