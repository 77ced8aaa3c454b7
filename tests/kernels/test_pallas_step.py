"""One token of the selective scan by the Pallas kernels: interpreted, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import numpy_oracles as oracles
from support.kernel_cases import cast, rounded, scan_arguments
from support.pallas import MODULES, PLATFORMS, each_lowered, each_run
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import selective_scan
from capibara_eqx.kernels._selective_scan._operands import pack


ALL = ("D", "z", "delta_bias", "initial_state", "reset")
STREAMS = ("u", "delta", "B", "C", "z")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def arguments_of(rows, d_inner, d_state, *, options=ALL, seed=0):
    """Of one token; half of the rows drop what they had, which is not even a number."""
    arguments = scan_arguments((rows,), 1, d_inner, d_state, options=options, seed=seed)
    if "reset" in arguments:
        arguments["reset"] = np.arange(rows)[:, None] % 2 == 0
        if "initial_state" in arguments:
            arguments["initial_state"][::2] = np.nan
    return arguments


def run(implementation, inputs, *, softplus=True):
    scan = functools.partial(
        selective_scan, delta_softplus=softplus, implementation=implementation
    )
    return jax.jit(scan)(**inputs)


def check(implementation, arguments, *, softplus=True):
    inputs = cast(arguments, "float32")
    y, state = run(implementation, inputs, softplus=softplus)
    want_y, want_state = oracles.selective_scan(
        **rounded(inputs), delta_softplus=softplus
    )
    length = arguments["A"].shape[-1] + 1
    assert_close(y, want_y, dtype="float32", length=length, name="y")
    assert_close(state, want_state, dtype="float32", length=length, name="state")


@each_run
@pytest.mark.parametrize(
    ("rows", "d_inner", "d_state"),
    [
        (20, 7, 5),
        slow(2, 3, 4),
        slow(5, 130, 23),
        slow(1, 1, 1),
        slow(3, 600, 16),
        slow(2, 5, 50),
    ],
)
def test_values_with_all_options(rows, d_inner, d_state, implementation):
    check(implementation, arguments_of(rows, d_inner, d_state))


@each_run
@pytest.mark.parametrize("option", [None, *map(slow, ALL)])
def test_values_with_each_option_alone(option, implementation):
    options = () if option is None else (option,)
    arguments = arguments_of(3, 5, 3, options=options)
    check(implementation, arguments, softplus=False)


@pytest.mark.slow
@each_run
def test_more_states_than_are_in_registers_at_a_time(implementation):
    # Of so many the kernel for several tokens, with its chunks, may have no room.
    inputs = cast(arguments_of(2, 5, 130), "float32")
    operands = pack(**inputs)
    step = MODULES[implementation].step
    y, state = jax.jit(lambda operands: step(operands, True, interpret=True))(operands)
    want_y, want_state = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    assert_close(y, want_y, dtype="float32", length=131, name="y")
    assert_close(state, want_state, dtype="float32", length=131, name="state")


@each_run
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    arguments = arguments_of(3, 5, 3)
    narrow = {name: v for name, v in arguments.items() if name in STREAMS}
    wide = {name: v for name, v in arguments.items() if name not in STREAMS}
    inputs = cast(narrow, "bfloat16") | cast(wide, "float32")
    y, state = run(implementation, inputs)
    want_y, want_state = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, want_y, length=4, name="y")
    assert_close(state, want_state, dtype="float32", length=4, name="state")


@each_run
def test_vmap_over_weights(implementation):
    # More rows than there are in a block, twice.
    several = [arguments_of(18, 5, 3, seed=seed) for seed in (1, 2)]
    inputs = [cast(arguments, "float32") for arguments in several]
    stacked = {name: jnp.stack([x[name] for x in inputs]) for name in inputs[0]}
    scan = functools.partial(
        selective_scan, delta_softplus=True, implementation=implementation
    )
    y, state = jax.jit(jax.vmap(lambda inputs: scan(**inputs)))(stacked)
    for index, known in enumerate(inputs):
        want_y, want_state = oracles.selective_scan(
            **rounded(known), delta_softplus=True
        )
        assert_close(y[index], want_y, dtype="float32", length=4, name="y")
        assert_close(state[index], want_state, dtype="float32", length=4, name="state")


@each_run
@pytest.mark.parametrize("seq", [1, 2])
def test_only_a_single_token_has_a_kernel_of_its_own(seq, implementation, monkeypatch):
    module = MODULES[implementation]
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return step(*args, **options)

    step = module.step
    monkeypatch.setattr(module, "step", counted)
    inputs = cast(scan_arguments((2,), seq, 3, 4), "float32")
    scan = functools.partial(selective_scan, implementation=implementation)
    jax.jit(lambda inputs: scan(**inputs)).lower(inputs)
    assert len(calls) == (seq == 1)
    # A derivative asks for the states that are saved, which the kernel does not write.
    smooth = {name: x for name, x in inputs.items() if name != "reset"}
    jax.jit(jax.grad(lambda inputs: jnp.sum(scan(**inputs)[0]))).lower(smooth)
    assert len(calls) == (seq == 1)


@each_lowered
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "d_inner", "d_state"),
    [(3, 49, 23), (64, 1536, 16), slow(2, 3, 4), slow(17, 7, 5)],
)
def test_it_lowers(rows, d_inner, d_state, dtype, implementation):
    types = {
        name: jax.ShapeDtypeStruct(
            values.shape,
            bool if name == "reset" else dtype if name in STREAMS else "float32",
        )
        for name, values in arguments_of(rows, d_inner, d_state).items()
    }
    scan = functools.partial(
        selective_scan, delta_softplus=True, implementation=implementation
    )
    platform = PLATFORMS[implementation]
    name = {"cuda": "mosaic", "tpu": "tpu_custom_call"}[platform]
    for options in (ALL, ()):
        known = {n: x for n, x in types.items() if n not in ALL or n in options}
        exported = export.export(
            jax.jit(lambda inputs: scan(**inputs)), platforms=[platform]
        )(known)
        assert name in exported.mlir_module()


@pytest.mark.parametrize("seq", [1, 2])
def test_a_tpu_has_no_numbers_of_64_bits_when_jax_has(seq):
    inputs = cast(scan_arguments((2,), seq, 3, 4), "float32")
    scan = functools.partial(selective_scan, implementation="pallas_tpu")
    with enable_x64(True):
        lowered = export.export(
            jax.jit(lambda inputs: scan(**inputs)), platforms=["tpu"]
        )(inputs)
    assert "tpu_custom_call" in lowered.mlir_module()
