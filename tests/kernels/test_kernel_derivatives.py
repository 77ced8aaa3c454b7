"""Derivatives of every kernel, of every order and mode, against the NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
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
from support.tolerances import assert_close


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SCAN = {"delta_softplus": True}
CONV = {"groups": 2, "dilation": 2}

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


@both
@over(CASES)
def test_vmap_of_derivatives(case, implementation):
    function, _, point = pair(case, implementation)
    check_vmap_of_derivatives(function, [point, {n: v * 0.7 for n, v in point.items()}])


@both
@over(CASES)
def test_checkpoint_changes_no_gradient(case, implementation):
    function, _, point = pair(case, implementation)
    with jax.enable_x64(True):
        arrays = as_arrays(point)
        want = jax.jit(jax.grad(function))(arrays)
        got = jax.jit(jax.grad(jax.checkpoint(function)))(arrays)
        for name in point:
            assert_close(
                got[name], want[name], dtype=np.float64, length=100, name=name
            )


def batch_specs(arguments, shared):
    return {
        name: PartitionSpec() if name in shared else PartitionSpec("data")
        for name in arguments
    }


@both
@over(CASES)
def test_shard_map_over_the_batch(case, implementation):
    operation, arguments, static = case
    point, fixed = split_fixed(arguments)
    shared = ("A", "D", "delta_bias", "weight", "bias")
    mesh = jax.make_mesh((1,), ("data",))

    def loss(smooth, known):
        run, _ = loss_pair(operation, implementation, known, **static)
        return run(smooth)[None]

    specs = batch_specs(point, shared), batch_specs(fixed, shared)
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")
    )
    with jax.enable_x64(True):
        arrays, known = as_arrays(point), as_arrays(fixed)
        want = jax.jit(jax.value_and_grad(functools.partial(total, loss)))(
            arrays, known
        )
        got = jax.jit(jax.value_and_grad(functools.partial(total, sharded)))(
            arrays, known
        )
        for one, other in zip(
            jax.tree.leaves(got), jax.tree.leaves(want), strict=True
        ):
            assert_close(one, other, dtype=np.float64, length=100)


def total(loss, smooth, known):
    return jnp.sum(loss(smooth, known))


@both
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_gradients_stay_finite_at_extreme_delta(shift, implementation):
    arguments = scan_arguments((2,), 5, 2, 3)
    arguments["delta"] = arguments["delta"] + shift
    check_finite_gradients(arguments, implementation)


@both
def test_gradients_stay_finite_on_zero_input(implementation):
    arguments = scan_arguments((2,), 5, 2, 3)
    zeros = {n: 0.0 * v for n, v in arguments.items() if n not in ("A", "reset")}
    check_finite_gradients(arguments | zeros, implementation)


def check_finite_gradients(arguments, implementation):
    point, fixed = split_fixed(arguments)
    function = finite_loss(implementation)
    gradient = function(cast(point, "float32"), cast(fixed, "float32"))
    for name, values in gradient.items():
        assert np.all(np.isfinite(values)), name
    assert any(np.any(values != 0.0) for values in gradient.values())


@functools.cache
def finite_loss(implementation):
    def loss(smooth, known):
        y, final_state = loss_outputs(smooth | known, implementation)
        return jnp.sum(y * jnp.cos(y)) + jnp.sum(final_state)

    return jax.jit(jax.grad(loss))


def loss_outputs(arguments, implementation):
    from capibara_eqx.kernels import selective_scan

    return selective_scan(
        **arguments, delta_softplus=True, implementation=implementation
    )
