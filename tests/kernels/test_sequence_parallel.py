"""Kernels over a sequence that is cut over the devices, if there are several."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.derivatives import (
    check_first_order,
    check_gradient,
    check_second_order,
    quick_jit,
)
from support.kernel_cases import (
    ORACLES,
    Arguments,
    cast,
    conv_arguments,
    recurrence_arguments,
    rounded,
    scan_arguments,
    smooth_loss,
    split_fixed,
    ssd_arguments,
)
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.kernels import (
    causal_conv,
    linear_recurrence,
    selective_scan,
    sharded_causal_conv,
    sharded_linear_recurrence,
    sharded_selective_scan,
    sharded_ssd,
    ssd,
)


DEVICES = min(8, len(jax.devices()))
pytestmark = pytest.mark.skipif(DEVICES == 1, reason="needs several devices")

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
PLAIN = {
    "linear_recurrence": linear_recurrence,
    "selective_scan": selective_scan,
    "causal_conv": causal_conv,
    "ssd": ssd,
}
WEIGHTS = ("A", "D", "delta_bias", "weight", "bias")
ROW = ("initial_state",)


class Case(NamedTuple):
    """An operation with its arguments at a length."""

    operation: str
    make: Any
    static: dict[str, Any] = {}

    def arguments(self, seq: int) -> Arguments:
        return self.make(seq)


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
    "conv_one_tap": Case(
        "causal_conv", lambda seq: conv_arguments((2,), seq, 2, 3, 1, options=())
    ),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
more = pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)


slow = pytest.mark.slow


@functools.cache
def line(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("seq",), axis_types=(axis_type,))


@functools.cache
def grid(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    shape = (ROWS, DEVICES // ROWS)
    return jax.make_mesh(shape, ("data", "seq"), axis_types=(axis_type,) * 2)


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
    length = max(x.shape[1] for x in arguments.values() if x.ndim > 2)
    for got, expected, name in zip(results, want, ("y", "state"), strict=True):
        assert_close(got, expected, dtype=dtype, length=length, name=name)


@functools.cache
def compiled(name: str):
    return quick_jit(over({**CASES, **MORE_CASES}[name], line()))


@pytest.mark.parametrize("seq", [UNEVEN, SHORT])
@every
def test_equals_the_loop(case, seq):
    arguments = case.arguments(seq)
    with enable_x64(True):
        results = quick_jit(over(case, line()))(**cast(arguments, "float64"))
    check(case, arguments, results)


@slow
@pytest.mark.parametrize("seq", [EVEN, UNEVEN, SHORT, 1])
@more
def test_more_options_equal_the_loop(case, seq):
    arguments = case.arguments(seq)
    with enable_x64(True):
        results = quick_jit(over(case, line()))(**cast(arguments, "float64"))
    check(case, arguments, results)


@every
def test_equals_one_device_and_keeps_its_dtypes(case):
    inputs = cast(case.arguments(EVEN), "bfloat16")
    results = jax.jit(over(case, line()))(**placed(inputs, line()))
    plain = functools.partial(PLAIN[case.operation], **case.static)
    for got, want in zip(results, jax.jit(plain)(**inputs), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, dtype=want.dtype, length=EVEN)
    y, state = results
    assert y.sharding.is_equivalent_to(NamedSharding(line(), P(None, "seq")), y.ndim)
    assert state.sharding.is_fully_replicated


seeds = st.integers(0, 2**32 - 1)
# Around the borders, and anywhere.
flags = st.lists(
    st.sampled_from([False, False, False, True]), min_size=2 * EVEN, max_size=2 * EVEN
)


@pytest.mark.parametrize("name", ["recurrence", "recurrence_reverse", "scan", "dual"])
@given(seed=seeds, resets=flags)
def test_any_values_and_any_resets(name, seed, resets):
    case = CASES[name]
    arguments = case.make(EVEN, seed=seed)
    arguments["reset"] = np.reshape(resets, (2, EVEN))
    results = compiled(name)(**cast(arguments, "float32"))
    check(case, arguments, results, "float32")


@given(
    seed=seeds,
    ids=st.lists(st.integers(-1, 1), min_size=2 * EVEN, max_size=2 * EVEN),
)
def test_any_documents_with_padding_anywhere(seed, ids):
    case = CASES["conv_documents"]
    arguments = case.make(EVEN, seed=seed)
    arguments["segment_ids"] = np.reshape(ids, (2, EVEN)).astype(np.int32)
    results = compiled("conv_documents")(**cast(arguments, "float32"))
    check(case, arguments, results, "float32")


BORDER = EVEN // 2


@pytest.mark.parametrize("at", [BORDER - 1, BORDER, BORDER + 1])
@pytest.mark.parametrize("name", ["recurrence", "recurrence_reverse", "scan", "dual"])
def test_a_reset_at_a_border_hides_what_overflowed(name, at):
    case, bad = CASES[name], 0 if name != "recurrence_reverse" else EVEN - 1
    arguments = case.arguments(EVEN)
    arguments["reset"] = np.arange(EVEN) == np.full((2, 1), at)
    inputs = cast(arguments, "float32")
    stream = "x" if "x" in inputs else "u"
    inputs[stream] = inputs[stream].at[:, bad].set(jnp.inf)
    y, state = compiled(name)(**inputs)
    want_y, want_state = ORACLES[case.operation](**rounded(arguments), **case.static)
    kept = slice(0, at + 1) if bad else slice(at, EVEN)
    assert_close(y[:, kept], want_y[:, kept], dtype="float32", length=EVEN)
    assert_close(state, want_state, dtype="float32", length=EVEN)


def losses(case: Case, fixed: Arguments, mesh: jax.sharding.Mesh, place):
    def function(point):
        return smooth_loss(jnp, over(case, mesh)(**point, **place(fixed)))

    def oracle(point):
        results = ORACLES[case.operation](**point, **fixed, **case.static)
        return float(smooth_loss(np, results))

    return function, oracle


@every
def test_gradient_with_rows_sharded_too(case):
    smooth, fixed = split_fixed(case.arguments(EVEN))
    mesh = grid()
    place = functools.partial(placed, mesh=mesh)
    check_gradient(*losses(case, fixed, mesh, place), smooth, place)


@pytest.mark.parametrize("seq", [EVEN, pytest.param(UNEVEN, marks=slow)])
@pytest.mark.parametrize("name", ["recurrence", "conv_depthwise", "scan_plain_steps"])
def test_gradient_over_explicit_axes(name, seq):
    case, mesh = CASES[name], line(AxisType.Explicit)
    smooth, fixed = split_fixed(case.arguments(seq))
    place = functools.partial(placed, mesh=mesh)
    with jax.set_mesh(mesh):
        check_gradient(*losses(case, fixed, mesh, place), smooth, place)


def unplaced(point):
    return {name: jnp.asarray(values) for name, values in point.items()}


@pytest.mark.parametrize(
    "name",
    [
        "recurrence",
        *(pytest.param(n, marks=slow) for n in CASES if n != "recurrence"),
    ],
)
def test_every_derivative_of_uneven_pieces(name):
    case = CASES[name]
    smooth, fixed = split_fixed(case.arguments(UNEVEN))
    pair = losses(case, fixed, line(), unplaced)
    check_first_order(*pair, smooth)
    check_second_order(*pair, smooth)


@slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@every
def test_second_order_of_rows_sharded_too(case, axis_type):
    mesh = grid(axis_type)
    smooth, fixed = split_fixed(case.arguments(UNEVEN))
    place = functools.partial(placed, mesh=mesh)
    with jax.set_mesh(mesh):
        check_second_order(*losses(case, fixed, mesh, unplaced), smooth)
        check_gradient(*losses(case, fixed, mesh, place), smooth, place)


def test_gradients_stay_finite_where_an_overflow_is_hidden():
    arguments = recurrence(EVEN)
    arguments["reset"] = np.arange(EVEN) == np.full((2, 1), BORDER)
    inputs = cast(arguments, "float32")
    inputs["x"] = inputs["x"].at[:, 0].set(jnp.inf)

    def loss(x, function):
        h, last = function(**{**inputs, "x": x})
        return jnp.sum(h[:, BORDER:] ** 2) + jnp.sum(last)

    sharded = over(CASES["recurrence"], line())
    got = jax.jit(jax.grad(lambda x: loss(x, sharded)))(inputs["x"])
    want = jax.jit(jax.grad(lambda x: loss(x, linear_recurrence)))(inputs["x"])
    late = slice(BORDER, EVEN)
    assert_close(got[:, late], want[:, late], dtype="float32", length=EVEN)


@slow
@every
def test_under_vmap_and_checkpoint_and_without_jit(case):
    arguments = case.arguments(EVEN)
    inputs = cast(arguments, "float32")
    check(case, arguments, over(case, line())(**inputs), "float32")
    shared = {name: x for name, x in inputs.items() if name in WEIGHTS}
    mapped = {name: x for name, x in inputs.items() if name not in WEIGHTS}
    run = jax.checkpoint(over(case, line()))
    results = jax.jit(jax.vmap(lambda row: run(**row, **shared)))(mapped)
    check(case, arguments, results, "float32")


@slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@every
def test_other_implementations(case, implementation):
    arguments = case.arguments(UNEVEN)
    run = over(case, line(), implementation=implementation)
    results = quick_jit(run)(**cast(arguments, "float32"))
    check(case, arguments, results, "float32")


def memory(case: Case, devices: int, seq: int, *, gradient: bool):
    """What XLA allocates on one device: `(arguments and results, all)` in bytes."""
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))
    arrays = cast(case.arguments(1), "float32")
    whole = {*WEIGHTS, *ROW}
    shapes = {
        name: jax.ShapeDtypeStruct(
            x.shape if name in whole else (2, seq, *x.shape[2:]),
            x.dtype,
            sharding=NamedSharding(mesh, P() if name in whole else P(None, "seq")),
        )
        for name, x in arrays.items()
    }
    fixed = {n: x for n, x in shapes.items() if x.dtype != jnp.float32}
    smooth = {n: x for n, x in shapes.items() if n not in fixed}

    def run(smooth, fixed):
        return over(case, mesh)(**smooth, **fixed)

    def loss(smooth, fixed):
        return sum(jnp.sum(jnp.sin(x)) for x in run(smooth, fixed))

    program = jax.jit(jax.grad(loss) if gradient else run).lower(smooth, fixed)
    found = program.compile().memory_analysis()
    outer = found.argument_size_in_bytes + found.output_size_in_bytes
    return outer, outer + found.temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize(
    "name",
    [
        "scan",
        *(
            pytest.param(n, marks=slow)
            for n in ("recurrence", "dual", "conv_documents")
        ),
    ],
)
def test_memory_of_a_device_falls_with_their_number(name, gradient):
    case = CASES[name]
    seq = 512 * DEVICES
    outer, peak = memory(case, DEVICES, seq, gradient=gradient)
    outer_alone, peak_alone = memory(case, 1, seq, gradient=gradient)
    # Weights and states of rows are whole on every device.
    assert outer <= 1.05 * outer_alone / DEVICES
    # Two passes over a piece, and the gathered summaries.
    assert peak <= 2 * peak_alone / DEVICES


@pytest.mark.errors
@pytest.mark.parametrize("operation", SHARDED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"axis": "sequence"},
            "`axis` must be an axis of the mesh.*data, seq.*'sequence'",
        ),
        ({"batch_axis": "dat"}, "`batch_axis` must be an axis.*Did you mean"),
        ({"batch_axis": "seq"}, "`batch_axis` must be another axis.*'seq' for both"),
    ],
)
def test_axes_that_the_mesh_does_not_have(operation, options, message):
    case = next(c for c in CASES.values() if c.operation == operation)
    inputs = cast(case.arguments(EVEN), "float32")
    call = {"axis": "seq", **options}
    with pytest.raises(ValueError, match=message):
        SHARDED[operation](**inputs, **case.static, mesh=grid(), **call)


@pytest.mark.errors
@pytest.mark.skipif(ROWS == 1, reason="needs two devices")
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_batch_that_the_devices_do_not_divide(batch):
    inputs = cast(recurrence_arguments(batch, EVEN, 2), "float32")
    call = {"mesh": grid(), "axis": "seq", "batch_axis": "data"}
    with pytest.raises(ValueError, match="divide the first batch axis.*leave"):
        sharded_linear_recurrence(**inputs, **call)


@pytest.mark.errors
def test_shapes_are_named_as_the_caller_knows_them():
    inputs = cast(scan(EVEN), "float32")
    inputs["B"] = inputs["B"][:, 1:]
    with pytest.raises(ValueError, match=rf"`B` must have .*got \(2, {EVEN - 1}, 3\)"):
        sharded_selective_scan(**inputs, mesh=line(), axis="seq")
    inputs = cast(scan(EVEN), "float32")
    with pytest.raises(ValueError, match="unknown `implementation` 'cuda'"):
        sharded_selective_scan(**inputs, mesh=line(), axis="seq", implementation="cuda")
