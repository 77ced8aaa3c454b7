"""Implicit gradients in all that the optimum depends on, against Newton's method."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.derivatives import check_gradient, gradient_along
from support.finite_differences import directional_derivative, random_direction
from support.precision import enable_x64

from capibara_eqx.meta import implicit_adapt, only, sgd


N, D = 4, 3
RNG = np.random.default_rng(1)
POINT = {
    "w": 0.5 * RNG.standard_normal(D),
    "scale": np.array(1.3),
    "x": RNG.standard_normal((N, D)),
    "y": RNG.standard_normal(N),
    "strength": np.array(0.8),
    "decay": np.array(0.3),
    "query": RNG.standard_normal(D),
}


def minimum(p):
    """Newton's method on mean((scale tanh(x w) - y)^2) + decay sum(w^4) + proximity."""
    w = p["w"]
    for _ in range(60):
        t = np.tanh(p["x"] @ w)
        slope = p["scale"] * (1 - t**2)
        r = p["scale"] * t - p["y"]
        gradient = 2 / N * p["x"].T @ (r * slope) + 4 * p["decay"] * w**3
        gradient = gradient + p["strength"] * (w - p["w"])
        curvature = slope**2 - 2 * r * t * slope
        hessian = 2 / N * (p["x"].T * curvature) @ p["x"]
        hessian += np.diag(12 * p["decay"] * w**2 + p["strength"])
        w = w - np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-14
    return w


def oracle(p):
    w = minimum(p)
    return float(p["scale"] * np.tanh(p["query"] @ w))


@jax.custom_vjp
def guarded_tanh(x):
    """A layer with a backward pass of its own has no derivative in forward mode."""
    return jnp.tanh(x)


def _forward(x):
    y = guarded_tanh(x)
    return y, y


def _backward(y, cotangent):
    return ((1 - y**2) * cotangent,)


guarded_tanh.defvjp(_forward, _backward)


def judged(arrays, tanh: Any = guarded_tanh, tolerance=1e-13, **options):
    """The query's value after adapting `w` alone; `decay` is closed over."""

    def predict(model, x):
        return model["scale"] * tanh(x @ model["w"])

    def loss(model, batch, *, key=None):
        x, y = batch
        size = arrays["decay"] * jnp.sum(model["w"] ** 4)
        return jnp.mean((predict(model, x) - y) ** 2) + size

    model = {"w": arrays["w"], "scale": arrays["scale"]}
    adapted = implicit_adapt(
        loss,
        model,
        (arrays["x"], arrays["y"]),
        strength=arrays["strength"],
        optimizer=sgd(0.2),
        steps=300,
        where=only(model, lambda model: model["w"]),
        cg_tolerance=tolerance,
        **options,
    )
    return predict(adapted, arrays["query"])


def test_gradients_reach_all_that_the_optimum_depends_on():
    check_gradient(judged, oracle, POINT)


@pytest.mark.slow
def test_second_derivatives_in_reverse_mode():
    rng = np.random.default_rng(2)
    common = random_direction(POINT, list(POINT), rng)
    with enable_x64(True):
        arrays, along = (
            {name: jnp.asarray(value) for name, value in part.items()}
            for part in (POINT, common)
        )
        function = lambda arrays: judged(arrays, jnp.tanh, 1e-12)
        found = jax.jit(jax.grad(gradient_along(function, along)))(arrays)
    for name in POINT:
        direction = random_direction(POINT, [name], rng)
        want = directional_derivative(oracle, POINT, common, direction)
        assert want.bound < 1e-7
        got = np.sum(np.asarray(found[name]) * direction[name])
        assert abs(got - want.value) < 1e-7 * want.scale, name


@pytest.mark.slow
def test_the_key_is_the_same_in_every_step(getkey):
    """A loss with noise is one function, so that its minimum can be reached."""
    key = getkey()

    def loss(model, batch, *, key):
        return jnp.mean((model - batch - jax.random.normal(key, (3,))) ** 2)

    @jax.jit
    def run(start, key):
        return implicit_adapt(
            loss,
            start,
            jnp.ones(3),
            strength=1.0,
            optimizer=sgd(0.3),
            steps=60,
            key=key,
        )

    found = run(jnp.zeros(3), key)
    target = 1 + jax.random.normal(key, (3,))
    # 2/3 (p - t) + p = 0
    np.testing.assert_allclose(found, 2 / 5 * target, rtol=1e-5)


@pytest.mark.slow
def test_a_network_in_bfloat16():
    """Its Hessian takes many steps, each rounded, which have to end somewhere."""
    model = eqx.nn.MLP(2, 1, 16, 2, jax.nn.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (10, 2))

    def loss(model, x, *, key=None):
        y = jax.vmap(model)(x).astype("float32")
        return jnp.mean((y[:, 0] - jnp.sin(x[:, 0].astype("float32"))) ** 2)

    @eqx.filter_jit
    @eqx.filter_grad
    def run(model, x):
        adapted = implicit_adapt(
            loss, model, x, strength=5, optimizer=sgd(0.1), steps=40
        )
        return loss(adapted, x + 1)

    def cast(tree, dtype):
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if eqx.is_array(leaf) else leaf, tree
        )

    start = cast(model, "bfloat16"), x.astype("bfloat16")
    narrow = cast(run(*start), "float32")
    wide = run(*cast(start, "float32"))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, narrow, wide))
    # Where conjugate gradients stop in bfloat16.
    assert difference < 8 * 2**-7 * optax.tree.norm(wide)


def test_bfloat16_and_mixed_parameters():
    model = {"a": jnp.ones(3, "bfloat16"), "b": jnp.full(2, 0.5, "float32")}

    def loss(model, batch, *, key=None):
        return jnp.sum((model["a"].astype("float32") - batch) ** 2) + jnp.sum(
            model["b"] ** 2
        )

    @eqx.filter_jit
    @eqx.filter_grad
    def run(model):
        adapted = implicit_adapt(
            loss, model, jnp.ones(3), strength=2.0, optimizer=sgd(0.1), steps=60
        )
        return jnp.sum(adapted["a"].astype("float32")) + jnp.sum(adapted["b"])

    found = run(model)
    # H = 2 I: the derivative is 1 / (1 + 2 / 2).
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found["a"], "float32"), 0.5, rtol=2**-8)
    np.testing.assert_allclose(found["b"], 0.5, rtol=1e-6)
