"""Derivatives of every kernel, of every order and mode, against the NumPy loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import (
    check_first_order,
    check_gradient,
    check_second_order,
    check_third_order,
    check_vmap_of_derivatives,
    gradient_along,
    hessian_product,
    quick_jit,
)
from support.kernel_cases import (
    FLOAT32_ONLY,
    RARE,
    cast,
    check_in_float32,
    conv_arguments,
    each,
    loss_pair,
    over,
    recurrence_arguments,
    scan_arguments,
    split_fixed,
    ssd_arguments,
)

from capibara_eqx.kernels import selective_scan


both = each("selective_scan")
# The reference has no derivative rules of its own, so how its derivatives transform is
# up to JAX alone.
ruled = functools.partial(over, but=("reference",))
thorough = functools.partial(ruled, slow=RARE)
SCAN: dict[str, Any] = {"delta_softplus": True}
CONV: dict[str, Any] = {"groups": 2, "dilation": 2}
DEPTHWISE: dict[str, Any] = {"groups": 3, "dilation": 2}

# name: (operation, arguments, static arguments). Every one has an initial state, and
# resets or segments where the operation has them; the loss reads the final state too.
CASES = {
    "selective_scan": ("selective_scan", scan_arguments((2,), 5, 2, 3, seed=1), SCAN),
    # So many states that a CPU reads one row after the other.
    "selective_scan_rows": (
        "selective_scan",
        scan_arguments((2,), 3, 49, 32, seed=11),
        SCAN,
    ),
    "linear_recurrence": (
        "linear_recurrence",
        recurrence_arguments((2,), 5, 2, seed=2),
        {},
    ),
    "linear_recurrence_reverse_complex": (
        "linear_recurrence",
        recurrence_arguments((2,), 5, 2, seed=3, is_complex=True),
        {"reverse": True},
    ),
    "ssd": ("ssd", ssd_arguments((2,), 5, 2, 2, 1, 3, seed=14), {}),
    "causal_conv": ("causal_conv", conv_arguments((2,), 8, 4, 2, 3, **CONV), CONV),
    "depthwise_conv": (
        "depthwise_conv",
        conv_arguments((2,), 8, 3, 3, 3, **DEPTHWISE),
        DEPTHWISE | {"activation": "silu"},
    ),
}
# Long enough to cross the border of a chunk, with a remainder.
LONG_CASES = {
    "selective_scan": (
        "selective_scan",
        scan_arguments((), 133, 1, 2, seed=4),
        SCAN,
    ),
    "linear_recurrence": (
        "linear_recurrence",
        recurrence_arguments((), 133, 2, seed=5),
        {},
    ),
    "ssd": (
        "ssd",
        ssd_arguments((), 11, 4, 1, 2, 2, seed=15),
        {"chunk_size": 4},
    ),
    "depthwise_conv": (
        "depthwise_conv",
        conv_arguments((), 133, 2, 2, 3, groups=2, seed=12),
        {"groups": 2},
    ),
}
# Nothing that is optional.
BARE_CASES = {
    "selective_scan": (
        "selective_scan",
        scan_arguments((), 6, 2, 2, options=(), seed=6),
        {},
    ),
    "linear_recurrence": (
        "linear_recurrence",
        recurrence_arguments((2,), 6, 2, options=(), seed=7),
        {},
    ),
    "ssd": ("ssd", ssd_arguments((2,), 6, 2, 1, 2, 2, options=(), seed=16), {}),
    "causal_conv": (
        "causal_conv",
        conv_arguments((2,), 6, 2, 3, 2, options=(), seed=8),
        {},
    ),
    "depthwise_conv": (
        "depthwise_conv",
        conv_arguments((2,), 6, 2, 2, 2, groups=2, options=(), seed=13),
        {"groups": 2},
    ),
}


def pair(case, implementation):
    """The loss on the operation, on the oracle, and the point to differentiate at."""
    operation, arguments, static = case
    point, fixed = split_fixed(arguments)
    return *loss_pair(operation, implementation, fixed, **static), point


def direction(point):
    return {name: jnp.cos(values) for name, values in point.items()}


def first_order(loss):
    def derivatives(point):
        tangent = jax.jvp(loss, (point,), (direction(point),))[1]
        return *jax.value_and_grad(loss)(point), tangent

    return derivatives


def second_order(loss):
    def derivatives(point):
        along = direction(point)
        reverse = jax.grad(gradient_along(loss, along))(point)
        return hessian_product(loss, along)(point), reverse

    return derivatives


def third_order(loss):
    def derivative(point):
        nested = loss
        for _ in range(3):
            nested = gradient_along(nested, direction(point))
        return nested(point)

    return derivative


def of_two_points(loss):
    def derivatives(point):
        points = {name: jnp.stack([x, x * 0.7]) for name, x in point.items()}
        return jax.vmap(lambda one: (first_order(loss)(one), second_order(loss)(one)))(
            points
        )

    return derivatives


def check(order, case, implementation):
    wide, narrow = {
        1: (check_first_order, first_order),
        2: (check_second_order, second_order),
        3: (check_third_order, third_order),
    }[order]
    if implementation in FLOAT32_ONLY:
        check_in_float32(narrow, case, implementation, order)
    else:
        wide(*pair(case, implementation))


@over(CASES)
def test_first_order(case, implementation):
    check(1, case, implementation)


@over(LONG_CASES, slow=RARE)
def test_first_order_across_chunks(case, implementation):
    check(1, case, implementation)


@over(BARE_CASES)
def test_first_order_without_options(case, implementation):
    check(1, case, implementation)


@thorough(CASES)
def test_second_order(case, implementation):
    check(2, case, implementation)


@thorough(LONG_CASES)
def test_second_order_across_chunks(case, implementation):
    check(2, case, implementation)


@thorough(
    {
        "selective_scan": (
            "selective_scan",
            scan_arguments((), 3, 1, 2, seed=9),
            SCAN,
        ),
        "linear_recurrence": (
            "linear_recurrence",
            recurrence_arguments((), 3, 2, seed=10),
            {},
        ),
        "ssd": ("ssd", ssd_arguments((), 3, 1, 2, 1, 2, seed=17), {"chunk_size": 2}),
    }
)
@pytest.mark.slow
def test_third_order(case, implementation):
    check(3, case, implementation)


@thorough(CASES)
def test_vmap_of_derivatives(case, implementation):
    if implementation in FLOAT32_ONLY:
        check_in_float32(of_two_points, case, implementation, 2)
        return
    function, oracle, point = pair(case, implementation)
    other = {name: values * 0.7 for name, values in point.items()}
    check_vmap_of_derivatives(function, oracle, [point, other])


@thorough(CASES)
def test_gradient_through_checkpoint(case, implementation):
    if implementation in FLOAT32_ONLY:
        kept = lambda loss: first_order(jax.checkpoint(loss))
        check_in_float32(kept, case, implementation, 1)
        return
    function, oracle, point = pair(case, implementation)
    check_gradient(jax.checkpoint(function), oracle, point)


@both
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_gradients_stay_finite_at_extreme_delta(shift, implementation):
    arguments = scan_arguments((2,), 5, 2, 3)
    arguments["delta"] = arguments["delta"] + shift
    check_finite_gradients(arguments, implementation)


@both
def test_gradients_stay_finite_on_zero_input(implementation):
    arguments = scan_arguments((2,), 5, 2, 3)
    zeros = {n: 0.0 * v for n, v in split_fixed(arguments)[0].items() if n != "A"}
    no_reset = {"reset": np.zeros((2, 5), bool)}
    check_finite_gradients(arguments | zeros | no_reset, implementation)


def check_finite_gradients(arguments, implementation):
    """In float32, where the extremes of `exp` are nearer than in float64."""
    smooth, fixed = (cast(part, "float32") for part in split_fixed(arguments))
    gradient = finite_loss(implementation)(smooth, fixed)
    for name, values in gradient.items():
        assert np.all(np.isfinite(values)), name
    assert any(np.any(values != 0.0) for values in gradient.values())


@functools.cache
def finite_loss(implementation):
    def loss(smooth, known):
        y, final_state = selective_scan(
            **smooth, **known, delta_softplus=True, implementation=implementation
        )
        return jnp.sum(y * jnp.cos(y)) + jnp.sum(final_state)

    return quick_jit(jax.grad(loss))
