"""`MetaLA` in NumPy and float64: features, fits of the head, steps of all of it.

Inner gradients of the whole network are derivatives by the complex step: the imaginary
part of `f(w + ih)` over `h`, exact to rounding since nothing is subtracted. So every
function of the forward pass keeps imaginary parts.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from scipy.special import erf
from support.numpy_oracles import Array

from capibara_eqx.meta import MetaLA


Weights = dict[str, Array]
_H = 1e-40


def weights_of(layer: Any) -> Weights:
    """All arrays of a layer by their path."""
    return {
        jtu.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jtu.tree_leaves_with_path(layer)
        if eqx.is_inexact_array(leaf)
    }


def with_weights(layer: Any, weights: Any) -> Any:
    """The layer with other arrays, which may be traced, at these paths."""

    def at(path, leaf):
        return weights.get(jtu.keystr(path, simple=True, separator="/"), leaf)

    return jtu.tree_map_with_path(at, layer)


def features(layer: Any, w: Weights, x: Array, pooled: bool) -> Array:
    z = np.stack([_features(layer, w, example) for example in np.asarray(x)])
    return z.mean(axis=1) if pooled else z


def fast_adapt(layer: Any, w: Weights, x: Array, y: Array, query: Array) -> Array:
    """Predictions of one task, as `MetaLA.fast_adapt`."""
    labels = np.issubdtype(np.asarray(y).dtype, np.integer)
    pooled = np.ndim(y) == (1 if labels else 2)
    w = dict(w)
    if layer.method == "maml":
        w = descend(layer, w, x, y, pooled)
    else:
        z = features(layer, w, x, pooled).reshape(-1, layer.d_model)
        y = np.asarray(y).reshape(-1) if labels else y.reshape(-1, layer.d_out)
        fit = ridge if layer.method == "ridge" else descend_head
        w["net/head/weight"], w["net/head/bias"] = fit(layer, w, z, y)
    return predict(layer, w, query, pooled)


def predict(layer: Any, w: Weights, x: Array, pooled: bool) -> Array:
    z = features(layer, w, x, pooled)
    return z @ w["net/head/weight"].T + w["net/head/bias"]


def descend_head(layer: Any, w: Weights, z: Array, y: Array) -> tuple[Array, Array]:
    """Gradient descent, with the gradient of each row written out."""
    weight, bias = w["net/head/weight"], w["net/head/bias"]
    for _ in range(layer.adaptation_steps):
        by_weight, by_bias = np.zeros_like(weight), np.zeros_like(bias)
        for row, target in zip(z, y, strict=True):
            error = weight @ row + bias
            if np.ndim(target) == 0:
                error = np.exp(error - error.max())
                error /= error.sum()
                error[target] -= 1
            else:
                error = error - target
            by_weight += np.outer(error, row) / len(z)
            by_bias += error / len(z)
        weight = weight - w["inner_rate"] * by_weight
        bias = bias - w["inner_rate"] * by_bias
    return weight, bias


def ridge(layer: Any, w: Weights, z: Array, y: Array) -> tuple[Array, Array]:
    """The normal equations of the distance to the start, in the weights themselves."""
    scale = 1.0
    if y.ndim == 1:
        y = np.eye(layer.d_out)[y]
        scale = np.exp(w["log_scale"])
    start = np.concatenate([w["net/head/weight"].T, w["net/head/bias"][None]])
    z = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    penalty = np.exp(w["log_lambda"])
    system = z.T @ z + penalty * np.eye(z.shape[1])
    solution = scale * np.linalg.solve(system, z.T @ y + penalty * start)
    return solution[:-1].T, solution[-1]


def descend(layer: Any, w: Weights, x: Array, y: Array, pooled: bool) -> Weights:
    """Gradient descent of every array of the network."""
    w = dict(w)
    for _ in range(layer.adaptation_steps):
        gradients = {}
        for name in w:
            if not name.startswith("net/"):
                continue
            gradients[name] = np.zeros_like(w[name])
            for index in np.ndindex(w[name].shape):
                nudged = w[name].astype(complex)
                nudged[index] += 1j * _H
                found = loss(predict(layer, w | {name: nudged}, x, pooled), y)
                gradients[name][index] = found.imag / _H
        for name, gradient in gradients.items():
            w[name] = w[name] - w["inner_rate"] * gradient
    return w


def loss(predictions: Any, y: Array) -> Any:
    """Half of the squared error or the cross-entropy, a mean over rows."""
    rows: Any = predictions.reshape(-1, predictions.shape[-1])
    if np.issubdtype(np.asarray(y).dtype, np.integer):
        terms = [
            np.log(np.sum(np.exp(row - row.real.max()))) + row.real.max() - row[label]
            for row, label in zip(rows, np.asarray(y).reshape(-1), strict=True)
        ]
        return sum(terms) / len(terms)
    return np.sum((rows - y.reshape(rows.shape)) ** 2) / (2 * len(rows))


def _features(layer: Any, w: Weights, x: Array) -> Array:
    """One example `(seq, d_model)`."""
    x = _encoded(layer, w, x)
    z = _rms_norm(x, w["net/norm/weight"], layer.net.norm.eps)
    return z / math.sqrt(layer.d_model)


def _encoded(layer: Any, w: Weights, x: Array) -> Array:
    encoder = layer.net.encoder
    at = lambda name: w[f"net/encoder/{name}"]
    x = np.asarray(x, np.result_type(x, np.float64))
    eps = encoder.attention_norm.eps
    seen = _rms_norm(x, at("attention_norm/weight"), eps)
    x = x + _attention(encoder.attention, at, seen)
    seen = _rms_norm(x, at("feed_forward_norm/weight"), eps)
    up = seen @ at("feed_forward/up_proj/weight").T + at("feed_forward/up_proj/bias")
    down = at("feed_forward/down_proj/weight")
    return x + _gelu(up) @ down.T + at("feed_forward/down_proj/bias")


def _attention(attention: Any, at: Any, x: Array) -> Array:
    """Every token sees all, one head after the other."""
    width = attention.head_dim
    q, k, v = (x @ at(f"attention/{part}_proj/weight").T for part in "qkv")
    heads = []
    for head in range(attention.n_heads):
        columns = slice(head * width, (head + 1) * width)
        q_head, k_head = (
            np.stack([_turned(row, i) for i, row in enumerate(part[:, columns])])
            for part in (q, k)
        )
        scores = q_head @ k_head.T / math.sqrt(width)
        scores = np.exp(scores - scores.real.max(axis=1, keepdims=True))
        heads.append(scores @ v[:, columns] / scores.sum(axis=1, keepdims=True))
    return np.concatenate(heads, axis=1) @ at("attention/o_proj/weight").T


def _turned(x: Array, position: int) -> Array:
    half = len(x) // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ]
    )


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _gelu(x: Any) -> Array:
    """The exact one; of a tiny imaginary part by its derivative."""
    real = x.real
    cumulative = (1 + erf(real / math.sqrt(2))) / 2
    if not np.iscomplexobj(x):
        return real * cumulative
    density = np.exp(-real * real / 2) / math.sqrt(2 * math.pi)
    return real * cumulative + 1j * x.imag * (cumulative + real * density)


def small_layer(method: str, seed: int, d_model: int = 4, **options: Any) -> Any:
    """A layer of numbers from NumPy, of order one: nothing is compiled."""
    options = {"dropout_rate": 0.0, "adaptation_steps": 2, **options}
    shapes = eqx.filter_eval_shape(
        lambda key: MetaLA(d_model, d_model // 2, 3, method=method, key=key, **options),
        jax.random.key(0),
    )
    rng = np.random.default_rng(seed)
    scalars = {"inner_rate": 0.3, "log_lambda": -1.0, "log_scale": 0.4}

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        name = jtu.keystr(path, simple=True, separator="/")
        value = scalars.get(name, 0.6 * rng.standard_normal(leaf.shape))
        return jnp.asarray(value, leaf.dtype)

    return jtu.tree_map_with_path(fill, shapes)


def small_task(targets: str, seed: int, d_model: int = 4, n: int = 5, seq: int = 3):
    """Support and query of one task: a target a step or sequence, or a label."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, seq, d_model))
    query = rng.standard_normal((2, seq + 1, d_model))
    shape = (n, seq) if "step" in targets else (n,)
    if "label" in targets:
        return x, rng.integers(0, 3, shape), query
    return x, rng.standard_normal((*shape, 3)), query
