"""Kernels over a sequence that is cut over the devices, if there are several."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.derivatives import quick_jit
from support.kernel_cases import (
    OPERATIONS,
    ORACLES,
    cast,
    recurrence_arguments,
    rounded,
)
from support.precision import enable_x64
from support.sequence_cases import (
    CASES,
    DEVICES,
    EVEN,
    MORE_CASES,
    ROW,
    ROWS,
    SHARDED,
    SHORT,
    UNEVEN,
    WEIGHTS,
    Case,
    check,
    every,
    grid,
    line,
    more,
    over,
    placed,
    scan,
    several,
)
from support.tolerances import assert_close

from capibara_eqx.kernels import sharded_linear_recurrence, sharded_selective_scan


pytestmark = several
slow = pytest.mark.slow


@functools.cache
def compiled(name: str):
    return quick_jit(over({**CASES, **MORE_CASES}[name], line()))


@pytest.mark.parametrize("seq", [UNEVEN, SHORT])
@every
def test_equals_the_loop(case, seq):
    arguments = case.make(seq)
    with enable_x64(True):
        results = quick_jit(over(case, line()))(**cast(arguments, "float64"))
    check(case, arguments, results)


@slow
@pytest.mark.parametrize("seq", [EVEN, UNEVEN, SHORT, 1])
@more
def test_more_options_equal_the_loop(case, seq):
    arguments = case.make(seq)
    with enable_x64(True):
        results = quick_jit(over(case, line()))(**cast(arguments, "float64"))
    check(case, arguments, results)


@every
def test_equals_one_device_and_keeps_its_dtypes(case):
    inputs = cast(case.make(EVEN), "bfloat16")
    results = jax.jit(over(case, line()))(**placed(inputs, line()))
    plain = functools.partial(OPERATIONS[case.operation], **case.static)
    for got, want in zip(results, jax.jit(plain)(**inputs), strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, dtype=want.dtype, length=EVEN)
    y, state = results
    assert y.sharding.is_equivalent_to(NamedSharding(line(), P(None, "seq")), y.ndim)
    assert state.sharding.is_fully_replicated


MIXED = [(AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)]


QUICK = [("recurrence", EVEN), ("conv_documents", UNEVEN)]
OTHERS = [(n, s) for n in CASES for s in (EVEN, UNEVEN) if (n, s) not in QUICK]


@pytest.mark.parametrize(
    ("name", "seq"), [*QUICK, *(pytest.param(*pair, marks=slow) for pair in OTHERS)]
)
@pytest.mark.parametrize("types", MIXED, ids=str)
def test_meshes_that_mix_types_of_axes(name, seq, types):
    case, mesh = CASES[name], grid(*types)
    arguments = case.make(seq)
    with jax.set_mesh(mesh):
        inputs = placed(cast(arguments, "float32"), mesh)
        results = quick_jit(over(case, mesh))(**inputs)
    check(case, arguments, results, "float32")


# The annotations want a sign, but only with the checks of types on.
@pytest.mark.errors
@pytest.mark.parametrize("seq", [EVEN, UNEVEN])
def test_documents_with_ids_that_have_no_sign(seq):
    case = CASES["conv_documents"]
    arguments = case.make(seq)
    arguments["segment_ids"] = np.abs(arguments["segment_ids"]).astype(np.uint8)
    results = quick_jit(over(case, line()))(**cast(arguments, "float32"))
    check(case, arguments, results, "float32")


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


# The dual multiplies tokens of one chunk together, and so an infinity by zero.
@pytest.mark.parametrize("at", [BORDER - 1, BORDER, BORDER + 1])
@pytest.mark.parametrize("name", ["recurrence", "recurrence_reverse", "scan"])
def test_a_reset_at_a_border_hides_what_overflowed(name, at):
    case, bad = CASES[name], 0 if name != "recurrence_reverse" else EVEN - 1
    arguments = case.make(EVEN)
    arguments["reset"] = np.arange(EVEN) == np.full((2, 1), at)
    inputs = cast(arguments, "float32")
    stream = "x" if "x" in inputs else "u"
    inputs[stream] = inputs[stream].at[:, bad].set(jnp.inf)
    y, state = compiled(name)(**inputs)
    want_y, want_state = ORACLES[case.operation](**rounded(arguments), **case.static)
    kept = slice(0, at + 1) if bad else slice(at, EVEN)
    assert_close(y[:, kept], want_y[:, kept], dtype="float32", length=EVEN)
    assert_close(state, want_state, dtype="float32", length=EVEN)


@slow
@every
def test_under_vmap_and_checkpoint_and_without_jit(case):
    arguments = case.make(EVEN)
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
    arguments = case.make(UNEVEN)
    run = over(case, line(), implementation=implementation)
    results = quick_jit(run)(**cast(arguments, "float32"))
    check(case, arguments, results, "float32")


def memory(case: Case, devices: int, seq: int, *, gradient: bool):
    """What XLA allocates on one device: `(arguments and results, all)` in bytes."""
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))
    arrays = cast(case.make(1), "float32")
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
    assert found is not None
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
    inputs = cast(case.make(EVEN), "float32")
    call = {"axis": "seq", **options}
    with pytest.raises(ValueError, match=message):
        SHARDED[operation](**inputs, **case.static, mesh=grid(), **call)


@pytest.mark.errors
@pytest.mark.parametrize("operation", SHARDED)
def test_a_mesh_that_is_none(operation):
    case = next(c for c in CASES.values() if c.operation == operation)
    inputs = cast(case.make(EVEN), "float32")
    mesh: Any = None
    message = f"sharded_{operation}: `mesh` must be a jax.sharding.Mesh.*got None"
    with pytest.raises(ValueError, match=message):
        SHARDED[operation](**inputs, **case.static, mesh=mesh, axis="seq")


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
