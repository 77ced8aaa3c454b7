"""Second derivatives through layers, inside of inner loops and outside.

What is differenced is of one order less, in float64: values for the gradient of a loss
after adapting, which has the second derivatives of the layer in it, and gradients for a
Hessian times a vector. That gradients and values of the layers are right is known from
their own tests, against loops in NumPy.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.bitnet_oracle import rounded_token, ternary
from support.derivatives import quick_jit
from support.numpy_oracles import rms_norm
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import Attention, BitNet158, Mamba, MoE
from capibara_eqx.meta import Task, adapt, maml, sgd


RATE, STEPS = 0.1, 2
LAYERS: dict[str, Callable[[], Any]] = {
    "mamba": functools.partial(filled, Mamba, 2, 2, d_conv=2, seed=0, size=0.5),
    **{
        f"attention {name}": functools.partial(
            filled, Attention, 4, 2, implementation=name, seed=1, size=0.5
        )
        for name in ("reference", "blockwise")
    },
    **{
        f"experts {name}": functools.partial(
            filled, MoE, 3, 3, 2, 2, implementation=name, seed=2, size=0.7
        )
        for name in ("scan", "dense")
    },
}


def loss(model, batch, *, key=None):
    x, y = batch
    found = model(x)
    found = found[0] if isinstance(found, tuple) else found
    return jnp.mean((found - y) ** 2)


def task_of(width):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 2, 2, 5, width))
    return Task((x[0], y[0]), (x[1], y[1]))


def flat(layer):
    """Its parameters as one vector of float64, and the way back."""
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    vector = np.concatenate([np.asarray(leaf, "float64").ravel() for leaf in leaves])
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def build(vector):
        parts = zip(jnp.split(vector, ends), leaves, strict=True)
        whole = [part.reshape(leaf.shape) for part, leaf in parts]
        return eqx.combine(jax.tree.unflatten(structure, whole), static)

    return vector, build


def central(function, point, direction, step=1e-3):
    """The derivative along a direction; the error is of order `step**4`."""
    offsets = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
    terms = [w * function(point + k * step * direction) for k, w in offsets.items()]
    return sum(terms) / step


def check(got, want):
    """Against a difference, whose error is about the fifth root of that of a value."""
    assert_close(got, want, dtype="float64", factor=1e6, terms=1)


def setting(name):
    """A layer as a function of a vector, the vector, a task, and two directions."""
    layer = LAYERS[name]()
    point, build = flat(layer)
    task = jax.tree.map(jnp.asarray, task_of(layer.d_model))
    rng = np.random.default_rng(6)
    directions = rng.standard_normal((2, point.size)) / np.sqrt(point.size)
    return build, point, task, directions


def adapting(name, *, forward):
    """The gradient of a loss after adapting, and the same by forward mode."""
    with enable_x64(True):
        build, point, task, (along, across) = setting(name)
        adapted = maml(loss, optimizer=sgd(RATE), steps=STEPS)
        after = lambda vector: adapted(build(vector), task)

        @quick_jit
        def compute(vector):
            tangent = jnp.zeros(())
            if forward:
                tangent = jax.jvp(after, (vector,), (jnp.asarray(along),))[1]
            return jax.value_and_grad(after)(vector), tangent

        value_of = lambda vector: np.asarray(compute(vector)[0][0])
        (_, gradient), tangent = jax.tree.map(np.asarray, compute(point))
        want = central(value_of, point, along)
        check(gradient @ along, want)
        if forward:
            check(tangent, want)
            check(gradient @ across, central(value_of, point, across))


@pytest.mark.slow
def test_adapting_through_mamba():
    adapting("mamba", forward=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_adapting_through_layers(name):
    adapting(name, forward=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_hessian_products(name):
    with enable_x64(True):
        build, point, task, (along, _) = setting(name)
        gradient = jax.grad(lambda vector: loss(build(vector), task.support))

        @quick_jit
        def compute(vector):
            tangent = jax.jvp(gradient, (vector,), (jnp.asarray(along),))[1]
            reverse = jax.grad(lambda v: gradient(v) @ along)(vector)
            return gradient(vector), tangent, reverse

        want = central(lambda vector: np.asarray(compute(vector)[0]), point, along)
        _, tangent, reverse = compute(point)
        check(tangent, want)
        check(reverse, want)
        assert np.max(np.abs(want)) > 1e-2


@pytest.mark.slow
def test_attention_that_is_float32_only():
    """`jax.nn.dot_product_attention` beside the same in float64, known from above."""

    def derivatives(name, dtype):
        layer = filled(Attention, 4, 2, implementation=name, seed=1, size=0.5)
        point, build = flat(layer)
        task = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), task_of(4))
        along = np.random.default_rng(6).standard_normal(point.shape).astype(dtype)
        after = maml(loss, optimizer=sgd(RATE), steps=STEPS)

        @quick_jit
        def compute(vector):
            gradient = jax.grad(lambda vector: loss(build(vector), task.support))
            return (
                jax.grad(lambda vector: after(build(vector), task))(vector),
                jax.jvp(gradient, (vector,), (jnp.asarray(along),))[1],
                jax.grad(lambda vector: gradient(vector) @ along)(vector),
            )

        return jax.tree.map(np.asarray, compute(jnp.asarray(point, dtype)))

    with enable_x64(True):
        wanted = derivatives("blockwise", "float64")
    for got, want in zip(derivatives("xla", "float32"), wanted, strict=True):
        assert got.dtype == np.float32
        assert_close(got, want, dtype="float32", length=100)


class Rounded:
    """BitNet158 where every rounding adds what it added at one point.

    Derivatives of what it computes, of any order, are those that pass through the
    rounding as if it were not there.
    """

    def __init__(self, weight, norm, x):
        normed = np.asarray([rms_norm(token, norm, 1e-5) for token in x])
        codes, gamma = ternary(weight)
        self.to_weight = gamma * codes - weight
        self.to_tokens = np.asarray([rounded_token(t) for t in normed]) - normed

    def loss(self, params, x, y):
        weight, norm = params
        size = jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-5)
        tokens = x / size * norm[None] + self.to_tokens
        return jnp.mean((tokens @ (weight + self.to_weight).T - y) ** 2)


def written_out(start, support, query):
    """Two steps with what rounding adds at each point: the points, the inner loss at
    the start, and the outer loss as a function of the start."""
    points, inner = [start], []
    for _ in range(STEPS):
        weight, norm = points[-1]
        inner.append(Rounded(weight, norm, support[0]))
        slopes = jax.grad(inner[-1].loss)([jnp.asarray(weight), norm], *support)
        points.append(
            [p - RATE * np.asarray(g) for p, g in zip(points[-1], slopes, strict=True)]
        )
    weight, norm = points[-1]
    last = Rounded(weight, norm, query[0])

    def after(params):
        for rounded in inner:
            slopes = jax.grad(rounded.loss)(params, *support)
            params = [p - RATE * g for p, g in zip(params, slopes, strict=True)]
        return last.loss(params, *query)

    return points, lambda params: inner[0].loss(params, *support), after


@pytest.mark.slow
def test_adapting_through_the_roundings_of_bitnet():
    rng = np.random.default_rng(8)
    x, z = rng.standard_normal((2, 4, 5))
    y, t = rng.standard_normal((2, 4, 3))
    params_of = lambda layer: [layer.weight.weight, layer.norm.weight]

    def same(got, want):
        for left, right in zip(params_of(got), want, strict=True):
            assert_close(left, right, dtype="float64", length=100)

    with enable_x64(True):
        layer = filled(BitNet158, 5, 3, seed=3, size=0.5)
        arrays, static = eqx.partition(layer, eqx.is_inexact_array)
        arrays = jax.tree.map(lambda leaf: leaf.astype("float64"), arrays)
        start = [np.asarray(p) for p in params_of(arrays)]
        points, before, after = written_out(start, (x, y), (z, t))
        task = jax.tree.map(jnp.asarray, Task((x, y), (z, t)))
        how: dict[str, Any] = {"optimizer": sgd(RATE), "steps": STEPS}
        direction = [rng.standard_normal(p.shape) for p in start]
        along = eqx.tree_at(params_of, arrays, [jnp.asarray(d) for d in direction])

        def inner(arrays):
            return loss(eqx.combine(arrays, static), task.support)

        def slope(arrays):
            pairs = zip(params_of(jax.grad(inner)(arrays)), direction, strict=True)
            return sum(jnp.sum(g * d) for g, d in pairs)

        @quick_jit
        def compute(arrays):
            layer = eqx.combine(arrays, static)
            adapted = adapt(loss, layer, task.support, **how)
            outer = lambda arrays: maml(loss, **how)(eqx.combine(arrays, static), task)
            return (
                eqx.filter(adapted, eqx.is_array),
                jax.value_and_grad(outer)(arrays),
                jax.jvp(outer, (arrays,), (along,))[1],
                jax.jvp(jax.grad(inner), (arrays,), (along,))[1],
                jax.grad(slope)(arrays),
            )

        adapted, (value, gradient), slope_along, *products = compute(arrays)
        same(adapted, points[-1])
        start = [jnp.asarray(p) for p in start]
        want, slopes = jax.value_and_grad(after)(start)
        assert_close(value, want, dtype="float64", length=100)
        same(gradient, slopes)
        pairs = zip(slopes, direction, strict=True)
        want = sum(np.sum(slope * by) for slope, by in pairs)
        assert_close(slope_along, want, dtype="float64", length=100)
        tangent = jax.jvp(jax.grad(before), (start,), (direction,))[1]
        for product in products:
            same(product, tangent)
