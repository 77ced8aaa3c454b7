"""Derivatives of every kernel, of every order and mode, against the NumPy loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.derivatives import (
    as_arrays,
    check_first_order,
    check_second_order,
    check_third_order,
    check_vmap_of_derivatives,
)
from support.kernel_cases import (
    IMPLEMENTATIONS,
    cast,
    conv_arguments,
    loss_pair,
    recurrence_arguments,
    scan_arguments,
    split_fixed,
)
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.kernels import selective_scan


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# The reference has no derivative rules of its own, so how its derivatives transform is
# up to JAX alone.
fast = pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name != "reference"]
)
SCAN: dict[str, Any] = {"delta_softplus": True}
CONV: dict[str, Any] = {"groups": 2, "dilation": 2}

# name: (operation, arguments, static arguments). Every one has an initial state, and
# resets or segments where the operation has them; the loss reads the final state too.
CASES = {
    "selective_scan": ("selective_scan", scan_arguments((2,), 5, 2, 3, seed=1), SCAN),
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
    "causal_conv": ("causal_conv", conv_arguments((2,), 8, 4, 2, 3, **CONV), CONV),
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
    "causal_conv": (
        "causal_conv",
        conv_arguments((2,), 6, 2, 3, 2, options=(), seed=8),
        {},
    ),
}


def pair(case, implementation):
    """The loss on the operation, on the oracle, and the point to differentiate at."""
    operation, arguments, static = case
    point, fixed = split_fixed(arguments)
    return *loss_pair(operation, implementation, fixed, **static), point


def over(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@functools.cache
def plain_gradient(name, implementation):
    """The loss of a case and its gradient, jitted and nothing else."""
    function, _, point = pair(CASES[name], implementation)
    with enable_x64(True):
        return jax.jit(jax.value_and_grad(function))(as_arrays(point))


def assert_plain_gradient(got, name, implementation):
    want = plain_gradient(name, implementation)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, other, dtype=np.float64, length=100)


@both
@over(CASES)
def test_first_order(case, implementation):
    check_first_order(*pair(case, implementation))


@both
@over(LONG_CASES)
def test_first_order_across_chunks(case, implementation):
    check_first_order(*pair(case, implementation))


@both
@over(BARE_CASES)
def test_first_order_without_options(case, implementation):
    check_first_order(*pair(case, implementation))


@both
@over(CASES)
def test_second_order(case, implementation):
    check_second_order(*pair(case, implementation))


@over(LONG_CASES)
def test_second_order_across_chunks(case):
    check_second_order(*pair(case, "xla"))


@pytest.mark.parametrize(
    "case",
    [
        ("selective_scan", scan_arguments((), 3, 1, 2, seed=9), SCAN),
        ("linear_recurrence", recurrence_arguments((), 3, 2, seed=10), {}),
    ],
    ids=["selective_scan", "linear_recurrence"],
)
def test_third_order(case):
    check_third_order(*pair(case, "xla"))


@fast
@over(CASES)
def test_vmap_of_derivatives(case, implementation):
    function, _, point = pair(case, implementation)
    check_vmap_of_derivatives(function, [point, {n: v * 0.7 for n, v in point.items()}])


@fast
@pytest.mark.parametrize("name", CASES)
def test_checkpoint_changes_no_gradient(name, implementation):
    function, _, point = pair(CASES[name], implementation)
    with enable_x64(True):
        derivative = jax.jit(jax.value_and_grad(jax.checkpoint(function)))
        assert_plain_gradient(derivative(as_arrays(point)), name, implementation)


@fast
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shard_map_over_the_batch(name, axis_type, implementation):
    operation, arguments, static = CASES[name]
    shared = ("A", "D", "delta_bias", "weight", "bias")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(axis_type,))
    specs = [
        {n: PartitionSpec() if n in shared else PartitionSpec("data") for n in part}
        for part in split_fixed(arguments)
    ]

    def loss(smooth, known):
        function, _ = loss_pair(operation, implementation, known, **static)
        return function(smooth)[None]

    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=tuple(specs), out_specs=PartitionSpec("data")
    )
    with enable_x64(True):
        smooth, known = (
            {
                n: jax.device_put(v, NamedSharding(mesh, where[n]))
                for n, v in part.items()
            }
            for part, where in zip(split_fixed(arguments), specs, strict=True)
        )
        total = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(sharded(*args))))
        assert_plain_gradient(total(smooth, known), name, implementation)


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

    return jax.jit(jax.grad(loss))
