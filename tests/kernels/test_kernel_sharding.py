"""Kernels over two devices, if there are two: in `shard_map`, and sharded by type."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.derivatives import check_gradient
from support.kernel_cases import (
    FLOAT32_ONLY,
    FUNCTIONS,
    RARE,
    assert_all_close,
    cast,
    conv_arguments,
    loss_pair,
    over,
    recurrence_arguments,
    rounded,
    scan_arguments,
    smooth_loss,
    split_fixed,
    ssd_arguments,
)
from support.precision import enable_x64


DEVICES = min(2, len(jax.devices()))


CASES = {
    "selective_scan": (
        "selective_scan",
        scan_arguments((2,), 5, 2, 3),
        {"delta_softplus": True},
    ),
    # So many states that a CPU reads one row after the other.
    "selective_scan_rows": ("selective_scan", scan_arguments((4,), 3, 49, 32), {}),
    "linear_recurrence": ("linear_recurrence", recurrence_arguments((2,), 5, 2), {}),
    "ssd": ("ssd", ssd_arguments((2,), 5, 2, 2, 1, 3), {"chunk_size": 3}),
    "causal_conv": (
        "causal_conv",
        conv_arguments((2,), 8, 4, 2, 3, groups=2, dilation=2),
        {"groups": 2, "dilation": 2},
    ),
    "depthwise_conv": (
        "depthwise_conv",
        conv_arguments((2,), 8, 3, 3, 3, groups=3),
        {"groups": 3, "activation": "silu"},
    ),
}
WHOLE = ("A", "D", "delta_bias", "weight", "bias")


def spec(name: str) -> P:
    return P() if name in WHOLE else P("data")


def placer(mesh: Mesh):
    def place(point):
        return {
            name: jax.device_put(values, NamedSharding(mesh, spec(name)))
            for name, values in point.items()
        }

    return place


def parts(case, start: str):
    """The case, with its initial state, or left to start from zeros."""
    operation, arguments, static = case
    if start == "fresh":
        kept = ("initial_state", "reset", "segment_ids")
        arguments = {n: v for n, v in arguments.items() if n not in kept}
    return operation, *split_fixed(arguments), static


starts = pytest.mark.parametrize(
    "start", ["given", pytest.param("fresh", marks=pytest.mark.slow)]
)


@starts
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@over(CASES, slow=RARE)
def test_gradient_through_shard_map(case, implementation, axis_type, start):
    operation, smooth, fixed, static = parts(case, start)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    place = placer(mesh)
    arguments = {**smooth, **fixed}

    def run(arrays):
        return FUNCTIONS[operation](**arrays, **static, implementation=implementation)

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=({n: spec(n) for n in arguments},),
        out_specs=(P("data"), P("data")),
    )

    def loss(point):
        return smooth_loss(jnp, sharded({**point, **place(fixed)}))

    _, oracle = loss_pair(operation, implementation, fixed, **static)
    with jax.set_mesh(mesh):
        if implementation not in FLOAT32_ONLY:
            check_gradient(loss, oracle, smooth, place)
            return
        inputs = cast(smooth, "float32")
        got = jax.jit(jax.grad(loss))(place(inputs))
    with enable_x64(True):
        function, _ = loss_pair(operation, "reference", fixed, **static)
        want = jax.grad(function)(cast(rounded(inputs), "float64"))
    assert_all_close(got, want, max(x.size for x in smooth.values()))


@starts
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["selective_scan", "selective_scan_rows"])
def test_gradient_of_rows_sharded_by_type(name, implementation, start):
    operation, smooth, fixed, static = parts(CASES[name], start)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    place = placer(mesh)
    _, oracle = loss_pair(operation, implementation, fixed, **static)
    with jax.set_mesh(mesh):
        function, _ = loss_pair(operation, implementation, place(fixed), **static)
        check_gradient(function, oracle, smooth, place)
