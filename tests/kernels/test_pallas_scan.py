"""The Pallas kernels of the selective scan: interpreted on the CPU, and lowered.

They compute in float32 only, so their derivatives are compared with those of the
reference in float64, which other tests compare with finite differences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import numpy_oracles as oracles
from support.kernel_cases import cast, rounded, scan_arguments, smooth_loss, split_fixed
from support.pallas import INTERPRETED, PLATFORMS, each_lowered, each_run
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import selective_scan
from capibara_eqx.kernels._selective_scan.specs import (
    BENCHMARK_SPECS,
    TEST_SPECS,
    Spec,
)


SMALL = {"one_row"}
specs = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            spec,
            id=spec.name,
            # An interpreted kernel takes long to compile: a small one stands for all.
            marks=[] if spec.name in SMALL else [pytest.mark.slow],
        )
        for spec in TEST_SPECS
    ],
)


def arguments_of(spec, **options):
    return scan_arguments((spec.batch,), *spec[2:], **options)


def scan(implementation, arguments):
    """The scan as a function of the arguments that can be differentiated."""
    smooth, fixed = split_fixed(arguments)

    def run(smooth):
        known = {name: jnp.asarray(values) for name, values in fixed.items()}
        return selective_scan(
            **smooth, **known, delta_softplus=True, implementation=implementation
        )

    return run, smooth


def length_of(arguments):
    return arguments["u"].shape[-2] * arguments["u"].shape[-1]


def assert_all_close(got, want, arguments):
    for name in want:
        length = length_of(arguments)
        assert_close(got[name], want[name], dtype="float32", length=length, name=name)


def in_float64(function, arguments):
    """`function` of the reference scan and the smooth arguments, in float64."""
    with enable_x64(True):
        run, smooth = scan("reference", arguments)
        return jax.tree.map(
            np.asarray,
            jax.jit(functools.partial(function, run))(cast(smooth, "float64")),
        )


@each_run
@specs
def test_values_and_gradients(spec, implementation):
    arguments = arguments_of(spec)
    run, smooth = scan(implementation, arguments)
    inputs = cast(smooth, "float32")

    def gradients(run, smooth):
        (y, state), pull = jax.vjp(run, smooth)
        return y, state, pull((jnp.cos(y), jnp.sin(state)))[0]

    y, state, got = jax.jit(functools.partial(gradients, run))(inputs)
    fixed = split_fixed(arguments)[1]
    want_y, want_state = oracles.selective_scan(
        **rounded(inputs), **fixed, delta_softplus=True
    )
    length = spec.seq + spec.d_state
    assert_close(y, want_y, dtype="float32", length=length, name="y")
    assert_close(state, want_state, dtype="float32", length=length, name="state")
    _, _, want = in_float64(gradients, rounded(inputs) | fixed)
    assert_all_close(got, want, arguments)


@each_run
@pytest.mark.parametrize(
    "option",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in (None, "D", "z", "delta_bias", "initial_state", "reset")
    ],
)
def test_each_option_alone(option, implementation):
    options = () if option is None else (option,)
    arguments = scan_arguments((2,), 19, 3, 4, options=options)
    run, smooth = scan(implementation, arguments)

    def gradient(run, smooth):
        return jax.grad(lambda smooth: smooth_loss(jnp, run(smooth)))(smooth)

    inputs = cast(smooth, "float32")
    got = jax.jit(functools.partial(gradient, run))(inputs)
    want = in_float64(gradient, rounded(inputs) | split_fixed(arguments)[1])
    assert_all_close(got, want, arguments)


@each_run
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    arguments = scan_arguments((2,), 19, 3, 4)
    narrow = {n: v for n, v in arguments.items() if n in ("u", "delta", "B", "C", "z")}
    wide = {n: v for n, v in arguments.items() if n not in narrow}
    inputs = cast(narrow, "bfloat16") | cast(wide, "float32")
    y, state = jax.jit(
        lambda inputs: selective_scan(
            **inputs, delta_softplus=True, implementation=implementation
        )
    )(inputs)
    want_y, want_state = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, want_y, length=23, name="y")
    assert_close(state, want_state, dtype="float32", length=23)


DERIVED = [
    Spec("tiny", 2, 5, 2, 3),
    *(pytest.param(spec, marks=pytest.mark.slow) for spec in TEST_SPECS),
]


@each_run
@pytest.mark.parametrize("spec", DERIVED, ids=lambda spec: spec.name)
def test_forward_mode_second_order_and_vmap(spec, implementation):
    rows = [arguments_of(spec, seed=seed) for seed in (1, 2)]
    for row in rows:
        row["reset"] = rows[0]["reset"]

    def derivatives(run, smooth):
        def loss(smooth):
            return smooth_loss(jnp, run(smooth))

        along = jax.tree.map(jnp.cos, smooth)
        value, tangent = jax.jvp(loss, (smooth,), (along,))
        product = jax.jvp(jax.grad(loss), (smooth,), (along,))[1]
        return {"value": value, "tangent": tangent} | product

    run, _ = scan(implementation, rows[0])
    inputs = [cast(split_fixed(row)[0], "float32") for row in rows]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    got = jax.jit(jax.vmap(functools.partial(derivatives, run)))(stacked)
    for index, (row, known) in enumerate(zip(rows, inputs, strict=True)):
        want = in_float64(derivatives, rounded(known) | split_fixed(row)[1])
        one = {name: values[index] for name, values in got.items()}
        # A second derivative is a sum over pairs of tokens.
        assert_all_close(one, want, {"u": np.zeros((spec.seq**2, spec.d_inner))})


@each_run
def test_padding_takes_part_in_nothing_even_where_a_rate_is_infinite(implementation):
    # Nine tokens: a chunk is padded. Softplus of a bias is no step size of zero.
    arguments = scan_arguments((1,), 9, 2, 3, options=("delta_bias", "initial_state"))
    arguments["A"][1, 2] = -np.inf
    inputs = cast(arguments, "float32")
    got = jax.jit(
        lambda inputs: selective_scan(
            **inputs, delta_softplus=True, implementation=implementation
        )
    )(inputs)
    want = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    for value, expected in zip(got, want, strict=True):
        assert_close(value, expected, dtype="float32", length=12)


@pytest.mark.slow
@each_run
def test_gradient_inside_shard_map(implementation):
    arguments = scan_arguments((2,), 5, 2, 3)
    run, smooth = scan(implementation, arguments)
    inputs = cast(arguments, "float32")
    devices = min(2, len(jax.devices()))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    whole = ("A", "D", "delta_bias")
    specs = {name: P() if name in whole else P("data") for name in inputs}

    def loss(inputs):
        known = {"reset": inputs.pop("reset")}
        results = jax.shard_map(
            lambda inputs: selective_scan(
                **inputs, delta_softplus=True, implementation=implementation
            ),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(P("data"), P("data")),
            # jax's interpreter of kernels does not keep track of what varies.
            check_vma=not INTERPRETED,
        )(inputs | known)
        return smooth_loss(jnp, results)

    def gradient(inputs):
        smooth = {n: v for n, v in inputs.items() if n != "reset"}
        return jax.grad(lambda s: loss(s | {"reset": inputs["reset"]}))(smooth)

    got = jax.jit(gradient)(inputs)
    want = in_float64(
        lambda run, smooth: jax.grad(lambda s: smooth_loss(jnp, run(s)))(smooth),
        rounded({n: v for n, v in inputs.items() if n != "reset"})
        | {"reset": arguments["reset"]},
    )
    assert_all_close(got, want, arguments)


LOWERED = [
    pytest.param(
        spec,
        dtype,
        id=f"{spec.name}-{dtype}",
        marks=[] if (spec.name, dtype) == ("odd", "bfloat16") else [pytest.mark.slow],
    )
    for spec in (*TEST_SPECS, *BENCHMARK_SPECS)
    for dtype in ("bfloat16", "float32")
]


@each_lowered
@pytest.mark.parametrize(("spec", "dtype"), LOWERED)
def test_a_gradient_lowers(spec, dtype, implementation):
    arguments = arguments_of(spec)
    sequences = ("u", "delta", "B", "C", "z")
    types = {
        name: jax.ShapeDtypeStruct(
            values.shape,
            bool if name == "reset" else dtype if name in sequences else "float32",
        )
        for name, values in arguments.items()
    }

    def gradient(inputs):
        reset = inputs["reset"]
        smooth = {name: x for name, x in inputs.items() if name != "reset"}

        def loss(smooth):
            y, state = selective_scan(
                **smooth,
                reset=reset,
                delta_softplus=True,
                implementation=implementation,
            )
            return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

        return jax.value_and_grad(loss)(smooth)

    platform = PLATFORMS[implementation]
    exported = export.export(jax.jit(gradient), platforms=[platform])(types)
    text = exported.mlir_module()
    # Forward and backward, each a kernel of its own.
    assert text.count("stablehlo.custom_call") >= 2
    assert ("mosaic" if platform == "cuda" else "tpu_custom_call") in text


@each_run
def test_what_a_kernel_cannot_serve_is_refused_with_the_reason(implementation):
    with enable_x64(True):
        inputs = cast(scan_arguments((2,), 5, 2, 3), "float64")
        with pytest.raises(NotImplementedError, match="float64"):
            selective_scan(**inputs, implementation=implementation)
    wide = cast(scan_arguments((1,), 2, 1, 4096, options=()), "float32")
    with pytest.raises(NotImplementedError, match="4096 states"):
        selective_scan(**wide, implementation=implementation)
    y, _ = selective_scan(**wide, implementation=(implementation, "xla"))
    assert_close(
        y, oracles.selective_scan(**rounded(wide))[0], dtype="float32", length=4096
    )
