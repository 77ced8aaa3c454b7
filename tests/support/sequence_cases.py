"""Kernels over a sequence that is cut over devices: cases, meshes, oracles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.kernel_cases import (
    ORACLES,
    Arguments,
    cast,
    conv_arguments,
    recurrence_arguments,
    rounded,
    scan_arguments,
    smooth_loss,
    ssd_arguments,
)
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.kernels import (
    sharded_causal_conv,
    sharded_linear_recurrence,
    sharded_selective_scan,
    sharded_ssd,
)


DEVICES = min(8, len(jax.devices()))
several = pytest.mark.skipif(DEVICES == 1, reason="needs several devices")

# Rows apart over two devices, where that leaves some, the sequence over the others.
ROWS = 2 if DEVICES % 2 == 0 else 1
# Two tokens a device; the same with the last device left without any; one token for
# some of them.
EVEN, UNEVEN, SHORT = 2 * DEVICES, max(1, 2 * DEVICES - 3), 3

SHARDED = {
    "linear_recurrence": sharded_linear_recurrence,
    "selective_scan": sharded_selective_scan,
    "causal_conv": sharded_causal_conv,
    "ssd": sharded_ssd,
}
WEIGHTS = ("A", "D", "delta_bias", "weight", "bias")
ROW = ("initial_state",)


class Case(NamedTuple):
    """An operation, its arguments by length (and seed), and what is static."""

    operation: str
    make: Callable[..., Arguments]
    static: dict[str, Any] = {}


def recurrence(seq, **options):
    return recurrence_arguments((2,), seq, 2, **options)


def scan(seq, **options):
    return scan_arguments((2,), seq, 2, 3, **options)


def grouped(seq, **options):
    # Taps that reach further back than a device's piece.
    return conv_arguments((2,), seq, 4, 2, 3, groups=2, dilation=2, **options)


def depthwise(seq):
    options = ("bias", "initial_state")
    return conv_arguments((2,), seq, 3, 3, 4, groups=3, options=options)


def dual(seq, **options):
    return ssd_arguments((2,), seq, 2, 2, 1, 3, **options)


WIDE = {"groups": 2, "dilation": 2}
CASES = {
    "recurrence": Case("linear_recurrence", recurrence),
    "recurrence_reverse": Case("linear_recurrence", recurrence, {"reverse": True}),
    "scan": Case("selective_scan", scan, {"delta_softplus": True}),
    "scan_plain_steps": Case("selective_scan", scan),
    "dual": Case("ssd", dual, {"chunk_size": 3}),
    "conv_depthwise": Case(
        "causal_conv", depthwise, {"groups": 3, "activation": "silu"}
    ),
    "conv_documents": Case("causal_conv", grouped, WIDE),
}
MORE_CASES = {
    "recurrence_bare": Case(
        "linear_recurrence", functools.partial(recurrence, options=())
    ),
    "recurrence_complex": Case(
        "linear_recurrence", functools.partial(recurrence, is_complex=True)
    ),
    "scan_bare": Case("selective_scan", functools.partial(scan, options=())),
    "scan_reset": Case("selective_scan", functools.partial(scan, options=("reset",))),
    "dual_bare": Case("ssd", functools.partial(dual, options=())),
    "conv_bare": Case("causal_conv", functools.partial(grouped, options=()), WIDE),
    "conv_fresh_documents": Case(
        "causal_conv", functools.partial(grouped, options=("segment_ids",)), WIDE
    ),
    "recurrence_alone": Case(
        "linear_recurrence", lambda seq: recurrence_arguments((), seq, 2)
    ),
    "scan_of_two_axes": Case(
        "selective_scan", lambda seq: scan_arguments((2, 3), seq, 2, 3)
    ),
    "dual_alone": Case("ssd", lambda seq: ssd_arguments((), seq, 4, 2, 2, 3)),
    "conv_alone": Case("causal_conv", lambda seq: conv_arguments((), seq, 2, 3, 4)),
    "conv_one_tap": Case(
        "causal_conv", lambda seq: conv_arguments((2,), seq, 2, 3, 1, options=())
    ),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
more = pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)


@functools.cache
def line(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("seq",), axis_types=(axis_type,))


@functools.cache
def grid(
    axis_type: AxisType = AxisType.Auto, rows_type: AxisType | None = None
) -> jax.sharding.Mesh:
    """Axes `data` and `seq`, of one type unless that of the rows is given."""
    shape, rows_type = (ROWS, DEVICES // ROWS), rows_type or axis_type
    return jax.make_mesh(shape, ("data", "seq"), axis_types=(rows_type, axis_type))


def over(case: Case, mesh: jax.sharding.Mesh, **options: Any):
    """The sharded operation of keyword arguments, over all axes of the mesh."""
    batch_axis = "data" if "data" in mesh.axis_names else None
    return functools.partial(
        SHARDED[case.operation],
        mesh=mesh,
        axis="seq",
        batch_axis=batch_axis,
        **case.static,
        **options,
    )


def placed(arrays, mesh: jax.sharding.Mesh):
    """Where the arguments of such a call lie in a sharded program."""
    rows = "data" if "data" in mesh.axis_names else None

    def spec(name, x):
        if name in WEIGHTS:
            return P()
        even = name not in ROW and x.shape[1] % mesh.shape["seq"] == 0
        return P(rows, "seq") if even else P(rows)

    return {
        name: jax.device_put(x, NamedSharding(mesh, spec(name, x)))
        for name, x in arrays.items()
    }


def check(case: Case, arguments: Arguments, results, dtype: str = "float64"):
    with enable_x64(dtype == "float64"):
        inputs = rounded(cast(arguments, dtype))
    want = ORACLES[case.operation](**inputs, **case.static)
    for got, expected, name in zip(results, want, ("y", "state"), strict=True):
        assert_close(got, expected, dtype=dtype, length=EVEN, name=name)


def losses(case: Case, fixed: Arguments, mesh: jax.sharding.Mesh, place):
    def function(point):
        return smooth_loss(jnp, over(case, mesh)(**point, **place(fixed)))

    def oracle(point):
        results = ORACLES[case.operation](**point, **fixed, **case.static)
        return float(smooth_loss(np, results))

    return function, oracle
