"""Which leaves move, of which dtypes, and what the loss is called with."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from support.derivatives import quick_jit
from support.tolerances import assert_close

from capibara_eqx.arrays import Affine, AffineArray
from capibara_eqx.meta import (
    Task,
    adapt,
    adapt_trajectory,
    maml,
    only,
    safe_adam,
    sgd,
)


RNG = np.random.default_rng(3)
# Slopes of the losses below, which are linear: the answers are multiples of them.
A, B, S = (
    RNG.standard_normal(shape).astype("float32") for shape in [(2, 3), 2, (2, 4)]
)
Z, CENTRE = (RNG.standard_normal(3) + 1j * RNG.standard_normal(3) for _ in range(2))


class Mixed(eqx.Module):
    """Parameters beside all that is none."""

    weight: Array
    bias: Array | None
    head: dict[str, Array]
    count: Array
    packed: Any
    name: str = eqx.field(static=True)
    width: int
    activation: Any
    enabled: bool


def mixed() -> Mixed:
    packed = AffineArray(
        codes=jnp.asarray([[0x18, 0x5F], [0x07, 0xC3]], "uint8"),
        scale=jnp.asarray([[0.5], [2.0]]),
        zero=None,
        spec=Affine(4),
        in_features=4,
        dtype=jnp.dtype("float32"),
    )
    head = {"bias": jnp.asarray(B), "table": jnp.arange(3)}
    return Mixed(
        jnp.asarray(A), None, head, jnp.arange(2), packed, "mixed", 3, jnp.tanh, True
    )


def linear_loss(model, batch, *, key=None):
    assert callable(model.activation)
    assert model.name == "mixed"
    assert model.enabled is True
    slope = jnp.sum(model.weight * A) + 2 * jnp.sum(model.head["bias"] * B)
    return batch * (slope + jnp.sum(model.packed.dense() * S))


def noisy(theta, batch, *, key):
    """Its gradient is what the key draws."""
    return jnp.sum(theta * jax.random.normal(key, theta.shape)) + 0 * batch


def distance(z, batch, *, key=None):
    return jnp.sum(jnp.abs(z - batch) ** 2)


def scaled(theta, batch, *, key=None):
    return jnp.sum(theta * batch) ** 2 / 2


def bowl(theta, batch):
    return batch * jnp.sum(theta**2) / 2


HOW: dict[str, Any] = {"optimizer": sgd(0.5), "steps": 3}
ONE = jnp.ones(())


def whole(arrays: Mixed) -> Mixed:
    """With what is no array, which a compiled function does not return."""
    return eqx.combine(arrays, eqx.filter(mixed(), eqx.is_array, inverse=True))


def is_matrix(leaf):
    return eqx.is_inexact_array(leaf) and leaf.ndim == 2


@functools.cache
def found() -> Any:
    """All of what most tests look at, in one compilation."""

    def compute(z, keys):
        model = mixed()

        def of(where=eqx.is_inexact_array):
            moved = adapt(linear_loss, model, ONE, **HOW, where=where)
            others = [eqx.filter(m, eqx.is_array, inverse=True) for m in (moved, model)]
            assert eqx.tree_equal(*others)
            return eqx.filter(moved, eqx.is_array)

        def drawn(key):
            return adapt_trajectory(noisy, jnp.zeros(2), ONE, **HOW, key=key)

        weights = jnp.asarray([0.5, 0.0, 0.5])
        multi_step = maml(linear_loss, **HOW, where=is_matrix, step_weights=weights)
        plain = [jnp.zeros(()), (jnp.ones(()), 4)]
        return {
            "all": of(),
            "head": of(only(model, lambda m: m.head)),
            "multi-step": multi_step(model, Task(ONE, ONE)),
            "list": adapt(lambda m, _: m[0] + 2 * m[1][0], plain, ONE, **HOW),
            "complex": adapt(distance, z, jnp.asarray(CENTRE, "complex64"), **HOW),
            "drawn": jax.vmap(drawn)(keys),
        }

    keys = jax.random.split(jax.random.key(0), 2)[jnp.asarray([0, 0, 1])]
    return quick_jit(compute)(jnp.asarray(Z, "complex64"), keys)


def test_floats_move_and_nothing_else():
    model, moved = mixed(), whole(found()["all"])
    assert_close(moved.weight, A - 1.5 * A, dtype="float32")
    assert_close(moved.head["bias"], B - 3 * B, dtype="float32")
    # A packed weight learns its steps, which are floats; its codes stay.
    values = np.asarray(model.packed.dense() / model.packed.scale, "float64")
    slope = np.sum(values * S, axis=1, keepdims=True)
    want = np.asarray(model.packed.scale) - 1.5 * slope
    assert_close(moved.packed.scale, want, dtype="float32", length=8)
    floats = lambda m: (m.weight, m.head["bias"], m.packed.scale)
    assert eqx.tree_equal(eqx.tree_at(floats, moved, floats(model)), model)


def test_a_part_moves_and_the_rest_stays_to_the_bit():
    model, moved = mixed(), whole(found()["head"])
    assert_close(moved.head["bias"], B - 3 * B, dtype="float32")
    back = eqx.tree_at(lambda m: m.head["bias"], moved, model.head["bias"])
    assert eqx.tree_equal(back, model)


@pytest.mark.slow
@pytest.mark.parametrize("where", [eqx.is_array, is_matrix])
def test_functions_of_a_leaf(where):
    model = mixed()
    moved = adapt(linear_loss, model, ONE, **HOW, where=where)
    assert_close(moved.weight, A - 1.5 * A, dtype="float32")
    np.testing.assert_array_equal(moved.count, model.count)
    bias = B if where is is_matrix else B - 3 * B
    assert_close(moved.head["bias"], bias, dtype="float32")


def test_a_function_of_a_leaf_sees_the_model_and_no_path():
    # On the path of the losses of every step each leaf has one axis more.
    scale, codes = (np.asarray(p, "float64") for p in _packed())
    values = codes * S
    slope = np.sum(values, axis=1, keepdims=True)
    losses = [
        np.sum((A - 0.5 * k * A) * A)
        + 2 * np.sum(B * B)
        + np.sum((scale - 0.5 * k * slope) * values)
        for k in (1, 3)
    ]
    assert_close(found()["multi-step"], np.mean(losses), dtype="float32", length=30)


def _packed():
    packed = mixed().packed
    return packed.scale, packed.dense() / packed.scale


def test_models_that_are_no_modules():
    first, (second, third) = found()["list"]
    assert (float(first), float(second), int(third)) == (-1.5, -2, 4)


def test_complex_parameters_go_down():
    # z - c becomes (1 - 2 a)^K (z - c), which a = 1/2 makes zero in one step.
    assert_close(found()["complex"], CENTRE, dtype="complex64")


@pytest.mark.slow
def test_the_rate_of_polyak_is_that_of_the_loss():
    z, centre = (jnp.asarray(part, "complex64") for part in (Z, CENTRE))
    optimizer = optax.polyak_sgd()
    moved = adapt(distance, z, centre, optimizer=optimizer, steps=2)
    # f / |g|^2 is 1/4 here, and each step halves the distance.
    assert_close(moved, CENTRE + (Z - CENTRE) / 4, dtype="complex64", length=8)


@pytest.mark.slow
def test_a_line_search_gets_what_it_asks_for():
    search = optax.scale_by_backtracking_linesearch(20)
    optimizer = optax.chain(optax.sgd(4.0), search)
    moved = adapt(bowl, jnp.ones(2), ONE, optimizer=optimizer, steps=1)
    # A step of 4 from 1 to -3 is cut to 0.8 of itself until it goes down.
    assert_close(moved, np.full(2, 1 - 4 * 0.8**4), dtype="float32")


def narrow(optimizer):
    def after(theta):
        slope = jnp.asarray([1.0, 0.5], "bfloat16")
        adapted = adapt(scaled, theta, slope, optimizer=optimizer, steps=1)
        return jnp.sum(adapted.astype("float32")), adapted

    theta = jnp.asarray([0.5, -0.25], "bfloat16")
    gradient, adapted = quick_jit(jax.grad(after, has_aux=True))(theta)
    assert gradient.dtype == adapted.dtype == jnp.bfloat16
    return gradient, adapted


def test_bfloat16_parameters_stay_so():
    # The slope at (1/2, -1/4) is 3/8 of (1, 1/2); every number here is exact.
    gradient, adapted = narrow(sgd(0.5))
    np.testing.assert_array_equal(adapted, [0.3125, -0.34375])
    np.testing.assert_array_equal(gradient, [0.25, 0.625])


@pytest.mark.slow
def test_the_first_step_of_adam_in_bfloat16():
    # It is the rate, whatever the slope.
    gradient, adapted = narrow(safe_adam(0.5))
    assert_close(adapted, np.array([0, -0.75]), dtype="bfloat16")
    assert_close(gradient, np.ones(2), dtype="bfloat16", terms=2)


def test_every_step_has_a_key_of_its_own():
    first, again, other = np.asarray(found()["drawn"])
    draws = np.diff(np.concatenate([np.zeros((1, 2)), first]), axis=0) / -0.5
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)
