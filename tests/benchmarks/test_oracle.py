from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _harness, _inputs, _oracle
from benchmarks.decode import layer_weights
from capibara_eqx.kernels import selective_scan
from capibara_eqx.layers import Mamba


def test_oracle_agrees_with_the_scan_and_its_gradients():
    # Longer than the chunks in which the reference reads.
    inputs = _inputs.scan_inputs(2, 67, 5, 3)
    y, gradients = _oracle.selective_scan_gradients(*inputs.arguments, dy=inputs.dy)
    forward = _oracle.selective_scan(*inputs.arguments)
    np.testing.assert_allclose(y, forward, rtol=1e-12, atol=1e-12)
    got = _harness.with_gradients(
        lambda *arguments: selective_scan(*arguments)[0], jnp.asarray(inputs.dy)
    )(*map(jnp.asarray, inputs.arguments))
    # Sums over at most 134 tokens of numbers rounded to 6e-8.
    assert _harness.max_error(got, (y, gradients)) < 4e-6
    wrong = (y, tuple(g * 1.001 for g in gradients))
    assert _harness.max_error(got, wrong) > 5e-4


def test_oracle_of_one_token_agrees_with_the_scan():
    token = _inputs.token_inputs(2, 5, 3)
    rows = {name: token[name][:, None] for name in ("u", "delta", "B", "C", "z")}
    arrays = {name: jnp.asarray(x) for name, x in {**token, **rows}.items()}
    arguments: dict[str, Any] = {**arrays, "delta_softplus": True}
    y, state = selective_scan(**arguments)
    expected = _oracle.selective_scan_step(**token)
    assert _harness.max_error((y[:, 0], state), expected) < 1e-6


def slope(function, inputs, cotangent, direction, small=1e-6):
    """The derivative of sum(cotangent y) along a direction, by a difference."""
    ends = [
        np.sum(
            cotangent
            * function(
                *[x + sign * small * v for x, v in zip(inputs, direction, strict=True)]
            )
        )
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * small)


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def test_oracle_gradients_are_the_slopes_of_its_outputs():
    shape = (2, 7, 3)
    scan = [x.astype(np.float64) for x in _inputs.scan_inputs(2, 7, 3, 2).arguments]
    cases = [
        (_oracle.selective_scan, _oracle.selective_scan_gradients, scan),
        (
            _oracle.linear_recurrence,
            _oracle.linear_recurrence_gradients,
            draw(shape, shape),
        ),
        (
            _oracle.causal_conv,
            _oracle.causal_conv_gradients,
            draw(shape, (3, 1, 4), (3,)),
        ),
    ]
    for function, with_gradients, inputs in cases:
        (cotangent,) = draw(shape, seed=1)
        direction = draw(*(x.shape for x in inputs), seed=2)
        _, gradients = with_gradients(*inputs, dy=cotangent)
        along = sum(np.sum(g * v) for g, v in zip(gradients, direction, strict=True))
        expected = slope(function, inputs, cotangent, direction)
        assert along == pytest.approx(expected, rel=1e-6)


def test_gradients_of_the_layer_are_the_slopes_of_its_output(getkey):
    layer = Mamba(4, d_state=3, key=getkey())
    weights = layer_weights(layer)
    names = sorted(weights)
    x, dy = draw((2, 5, 4), (2, 5, 4))
    y, (gradients, dx) = _oracle.mamba_gradients(weights, x, dy)
    np.testing.assert_allclose(y, _oracle.mamba(weights, x), rtol=1e-12)
    inputs = [*(weights[name].astype(np.float64) for name in names), x]
    direction = draw(*(value.shape for value in inputs), seed=3)

    def output(*values):
        *parameters, x = values
        return _oracle.mamba(dict(zip(names, parameters, strict=True)), x)

    # One input after the other: a small gradient is not lost beside a large one.
    for at, gradient in enumerate([*(gradients[name] for name in names), dx]):
        along = [v * (k == at) for k, v in enumerate(direction)]
        expected = slope(output, inputs, dy, along)
        found = np.sum(gradient * direction[at])
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), (names + ["x"])[at]


def test_oracle_of_the_layer_agrees_with_it(getkey):
    layer = Mamba(8, d_state=3, key=getkey())
    (x,) = _inputs.normal(0, (2, 11, 8))
    got = layer(jnp.asarray(x))
    assert _harness.max_error(got, _oracle.mamba(layer_weights(layer), x)) < 2e-6


def test_oracle_hessian_is_symmetric():
    inputs = _inputs.scan_inputs(1, 6, 3, 2)
    shapes = [x.shape for x in inputs.arguments]
    v, w = (_inputs.normal(seed, *shapes) for seed in (1, 2))

    def form(left, right):
        product = _oracle.selective_scan_hvp(inputs.arguments, inputs.dy, right)
        return sum(np.sum(x * y) for x, y in zip(left, product, strict=True))

    assert form(v, w) == pytest.approx(form(w, v), rel=1e-6)
    assert abs(form(v, w)) > 1e-2


def test_the_loss_of_a_model_without_layers_is_that_of_its_table():
    table, norm = np.eye(3), np.ones(3)
    tokens = np.array([[0, 0, 1]])
    scores = np.sqrt(1 / (1 / 3 + 1e-5))
    # Twice the score is for the token that was just read; once it is the next one.
    expected = np.log(np.exp(scores) + 2) - scores / 2
    loss = _oracle.language_model_loss(table, [], norm, tokens)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert jax.tree.leaves(loss) == [loss]
