"""The selective scan's values, against the NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import numpy_oracles as oracles
from support.kernel_cases import (
    FLOAT32_ONLY,
    FUSED,
    RARE,
    cast,
    compiled,
    each,
    rounded,
    scan_arguments,
    skip_if_refused,
)
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import selective_scan
from capibara_eqx.kernels._selective_scan.specs import TEST_SPECS


both = each("selective_scan")
long = each("selective_scan", slow=RARE)

ODD_SHAPES = [
    ((), 1, 1, 1),
    ((1,), 2, 3, 4),
    ((2,), 7, 5, 16),
    ((2, 3), 31, 3, 1),
    ((), 65, 5, 4),
    ((2,), 100, 3, 16),
]
NAMED_SHAPES = [
    ((spec.batch,), spec.seq, spec.d_inner, spec.d_state) for spec in TEST_SPECS
]
ALL_SHAPES = [*ODD_SHAPES, *NAMED_SHAPES]
# float64 is the sharper test, so it sees every shape, wherever a kernel takes it.
FLOAT32_SHAPES = [ODD_SHAPES[-1], NAMED_SHAPES[-1]]
if FUSED in FLOAT32_ONLY:
    FLOAT32_SHAPES = ALL_SHAPES
SHAPES = [
    *((shape, "float64") for shape in ALL_SHAPES),
    *((shape, "float32") for shape in FLOAT32_SHAPES),
]
OPTIONS = ["D", "z", "delta_bias", "initial_state", "reset"]


def check(arguments, implementation, dtype, delta_softplus=True):
    """Run in `dtype` and compare both results with the oracle on the same inputs."""
    skip_if_refused(implementation, dtype)
    run = compiled("selective_scan", implementation, delta_softplus=delta_softplus)
    with enable_x64(dtype == "float64"):
        inputs = cast(arguments, dtype)
        y, final_state = run(**inputs)
        want_y, want_state = oracles.selective_scan(
            **rounded(inputs), delta_softplus=delta_softplus
        )
        length = arguments["u"].shape[-2] + arguments["A"].shape[-1]
        assert y.dtype == final_state.dtype == dtype
        assert_close(y, want_y, dtype=dtype, length=length, name="y")
        assert_close(
            final_state, want_state, dtype=dtype, length=length, name="final_state"
        )


@long
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_every_option_in_odd_shapes(shape, dtype, implementation):
    check(scan_arguments(*shape), implementation, dtype)


@both
@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_each_option_alone_without_softplus(option, implementation):
    options = () if option is None else (option,)
    arguments = scan_arguments((2,), 7, 3, 4, options=options)
    check(arguments, implementation, "float32", delta_softplus=False)


@long
@pytest.mark.parametrize("narrow", ["all", "sequences"])
def test_bfloat16_is_computed_in_float32_and_rounded_once(narrow, implementation):
    arguments = scan_arguments((2,), 65, 3, 4)
    parameters = () if narrow == "all" else ("A", "D", "delta_bias")
    wide = {name: arguments[name] for name in ("initial_state", *parameters)}
    inputs = cast(arguments, "bfloat16") | cast(wide, "float32")
    run = compiled("selective_scan", implementation, delta_softplus=True)
    y, final_state = run(**inputs)
    want_y, want_state = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    assert y.dtype == jnp.bfloat16
    assert final_state.dtype == jnp.float32
    assert_rounded(y, want_y, length=69, name="y")
    assert_close(final_state, want_state, dtype=np.float32, length=69)


@long
def test_without_jit_and_with_batch_axes_of_size_one(implementation):
    arguments = scan_arguments((1, 1), 3, 2, 2)
    inputs = cast(arguments, "float32")
    y, final_state = selective_scan(**inputs, implementation=implementation)
    want_y, want_state = oracles.selective_scan(**rounded(inputs))
    assert_close(y, want_y, dtype=np.float32)
    assert_close(final_state, want_state, dtype=np.float32)


@long
@pytest.mark.parametrize("shift", [-1e4, -80.0, 30.0, 1e4])
def test_extreme_delta_before_softplus(shift, implementation):
    arguments = scan_arguments((2,), 7, 5, 16)
    arguments["delta"] = arguments["delta"] + shift
    check(arguments, implementation, "float32")


@both
def test_delta_of_either_sign_without_softplus(implementation):
    arguments = scan_arguments((2,), 7, 3, 4, options=("D",))
    arguments["delta"] = np.linspace(-2.0, 2.0, 42).reshape(2, 7, 3)
    check(arguments, implementation, "float32", delta_softplus=False)


@long
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e6])
def test_zero_tiny_and_large_inputs(scale, implementation):
    arguments = scan_arguments((2,), 7, 5, 16)
    for name in ("u", "B", "z", "initial_state"):
        arguments[name] = arguments[name] * scale
    check(arguments, implementation, "float32")


@both
def test_a_reset_hides_what_overflowed_before_it(implementation):
    arguments = scan_arguments((2,), 7, 5, 16)
    arguments["reset"] = np.zeros((2, 7), bool)
    arguments["reset"][:, 4] = True
    clean = cast(arguments, "float32")
    spoiled = dict(clean, u=clean["u"].at[:, 1].set(jnp.inf))
    run = compiled("selective_scan", implementation, delta_softplus=True)
    y, final_state = run(**spoiled)
    want_y, want_state = oracles.selective_scan(**rounded(clean), delta_softplus=True)
    assert_close(y[:, 4:], want_y[:, 4:], dtype=np.float32, length=20)
    assert_close(final_state, want_state, dtype=np.float32, length=20)


@both
def test_vmap_over_batch_and_over_every_argument(implementation):
    arguments = [scan_arguments((), 7, 3, 4, seed=seed) for seed in range(3)]
    stacked = {
        name: np.stack([one[name] for one in arguments]) for name in arguments[0]
    }
    inputs = cast(stacked, "float32")
    run = compiled("selective_scan", implementation, delta_softplus=True)
    y, final_state = jax.jit(jax.vmap(lambda one: run(**one)))(inputs)
    shared = dict(inputs)
    for name in ("A", "D", "delta_bias"):
        shared[name] = inputs[name][0]
    axes = {name: None if name in ("A", "D", "delta_bias") else 0 for name in inputs}
    over_batch = jax.jit(jax.vmap(lambda one: run(**one), in_axes=(axes,)))(shared)
    batched = run(**shared)
    for row in range(3):
        own = {name: values[row] for name, values in rounded(inputs).items()}
        want_y, want_state = oracles.selective_scan(**own, delta_softplus=True)
        assert_close(y[row], want_y, dtype=np.float32, length=11)
        assert_close(final_state[row], want_state, dtype=np.float32, length=11)
    for got, want in zip(over_batch, batched, strict=True):
        assert_close(got, want, dtype=np.float32, length=11)


SEQ = 7
seeds = st.integers(0, 2**32 - 1)
inside = st.integers(1, SEQ - 1)


def sliced(inputs, start, stop):
    """The part of the inputs that has a time axis, cut; the rest as it is."""
    timed = ("u", "delta", "B", "C", "z", "reset")
    return {
        name: values[:, start:stop] if name in timed else values
        for name, values in inputs.items()
    }


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, dtype=np.float32, length=SEQ + 4)


@long
@given(seed=seeds, at=inside)
def test_a_run_may_be_split_anywhere(implementation, seed, at):
    inputs = cast(scan_arguments((2,), SEQ, 3, 4, seed=seed), "float32")
    run = compiled("selective_scan", implementation, delta_softplus=True)
    first, state = run(**sliced(inputs, 0, at))
    second, final = run(**dict(sliced(inputs, at, SEQ), initial_state=state))
    want = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    assert_same((jnp.concatenate([first, second], axis=1), final), want)


@long
@given(seed=seeds, at=inside)
def test_a_reset_separates_two_runs(implementation, seed, at):
    arguments = scan_arguments((2,), SEQ, 3, 4, seed=seed)
    arguments["reset"] = np.arange(SEQ) == np.full((2, 1), at)
    inputs = cast(arguments, "float32")
    run = compiled("selective_scan", implementation, delta_softplus=True)
    apart = dict(inputs, reset=jnp.zeros((2, SEQ), bool))
    empty = jnp.zeros_like(inputs["initial_state"])
    first, _ = run(**sliced(apart, 0, at))
    second, final = run(**dict(sliced(apart, at, SEQ), initial_state=empty))
    assert_same(run(**inputs), (jnp.concatenate([first, second], axis=1), final))


@long
@given(
    seed=seeds,
    resets=st.lists(st.booleans(), min_size=2 * SEQ, max_size=2 * SEQ),
    shift=st.floats(-20.0, 20.0, width=32),
)
def test_any_values_and_any_resets(implementation, seed, resets, shift):
    arguments = scan_arguments((2,), SEQ, 3, 4, seed=seed)
    arguments["reset"] = np.array(resets).reshape(2, SEQ)
    arguments["delta"] = arguments["delta"] + shift
    check(arguments, implementation, "float32")
