"""The gradient of MAML for a network of affine maps, in float64 NumPy.

The outer gradient is pulled back through every inner step: $v_k = v_{k+1} - \\alpha
H(\\theta_k) v_{k+1}$, with the Hessian-vector product as a derivative of the gradient
along `v`, written out.
"""

from collections.abc import Sequence

import numpy as np


# A weight `(out, in)` and a bias `(out,)` for each map.
Weights = Sequence[tuple[np.ndarray, np.ndarray]]

# Value, first and second derivative, of the argument.
_ACTIVATIONS = {
    "relu": (
        lambda x: np.maximum(x, 0),
        lambda x: (x > 0).astype(np.float64),
        np.zeros_like,
    ),
    "tanh": (
        np.tanh,
        lambda x: 1 - np.tanh(x) ** 2,
        lambda x: -2 * np.tanh(x) * (1 - np.tanh(x) ** 2),
    ),
}


def maml(
    weights: Weights,
    tasks: tuple[np.ndarray, ...],
    rate: float,
    steps: int,
    activation: str,
) -> tuple[np.float64, list[np.ndarray]]:
    """Mean squared error after adapting and its gradient, the mean of the tasks.

    **Arguments:**

    - `weights`: of the maps, with an activation between each two.
    - `tasks`: inputs and targets to learn from and to be judged by, `(tasks, n, d)`.
    - `rate`, `steps`: of the inner gradient descent.
    - `activation`: `"relu"` or `"tanh"`.

    **Returns:**

    The loss, and gradients in the order weight, bias, weight, ...
    """
    start = [np.asarray(a, np.float64) for pair in weights for a in pair]
    tasks = tuple(np.asarray(a, np.float64) for a in tasks)
    losses, gradients = [], []
    for x, y, x_query, y_query in zip(*tasks, strict=True):
        path = [start]
        for _ in range(steps):
            _, gradient = _gradient(path[-1], x, y, activation)
            path.append(_along(path[-1], gradient, -rate))
        loss, v = _gradient(path[-1], x_query, y_query, activation)
        for params in reversed(path[:-1]):
            v = _along(v, _hessian_product(params, v, x, y, activation), -rate)
        losses.append(loss)
        gradients.append(v)
    mean = [np.mean(parts, axis=0) for parts in zip(*gradients, strict=True)]
    return np.mean(losses), mean


def _along(params, direction, scale):
    return [p + scale * d for p, d in zip(params, direction, strict=True)]


def _forward(params, x, activation):
    """Inputs of every map, and what every map makes of them."""
    value = _ACTIVATIONS[activation][0]
    inputs, outputs = [x], []
    for weight, bias in _pairs(params):
        outputs.append(inputs[-1] @ weight.T + bias)
        inputs.append(value(outputs[-1]))
    return inputs[:-1], outputs


def _pairs(params):
    return list(zip(params[::2], params[1::2], strict=True))


def _gradient(params, x, y, activation):
    slope = _ACTIVATIONS[activation][1]
    inputs, outputs = _forward(params, x, activation)
    difference = outputs[-1] - y
    delta = 2 * difference / difference.size
    found = []
    for layer in reversed(range(len(inputs))):
        found = [delta.T @ inputs[layer], delta.sum(axis=0), *found]
        if layer:
            delta = (delta @ params[2 * layer]) * slope(outputs[layer - 1])
    return np.mean(difference**2), found


def _hessian_product(params, v, x, y, activation):
    """The derivative of `_gradient` along `v`; names with a d are derivatives."""
    _, slope, bend = _ACTIVATIONS[activation]
    inputs, outputs = _forward(params, x, activation)
    d_inputs, d_outputs = [np.zeros_like(x)], []
    for layer, ((weight, _), (d_weight, d_bias)) in enumerate(
        zip(_pairs(params), _pairs(v), strict=True)
    ):
        d_output = inputs[layer] @ d_weight.T + d_inputs[-1] @ weight.T + d_bias
        d_outputs.append(d_output)
        d_inputs.append(slope(outputs[layer]) * d_output)
    size = outputs[-1].size
    delta, d_delta = 2 * (outputs[-1] - y) / size, 2 * d_outputs[-1] / size
    found = []
    for layer in reversed(range(len(inputs))):
        d_weight = d_delta.T @ inputs[layer] + delta.T @ d_inputs[layer]
        found = [d_weight, d_delta.sum(axis=0), *found]
        if layer:
            weight, before = params[2 * layer], outputs[layer - 1]
            back = delta @ weight
            d_back = d_delta @ weight + delta @ v[2 * layer]
            d_delta = d_back * slope(before)
            d_delta += back * bend(before) * d_outputs[layer - 1]
            delta = back * slope(before)
    return found
