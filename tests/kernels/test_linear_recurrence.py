"""The linear recurrence's values, against the NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import numpy_oracles as oracles
from support.kernel_cases import (
    IMPLEMENTATIONS,
    cast,
    compiled,
    recurrence_arguments,
    rounded,
)
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import linear_recurrence
from capibara_eqx.kernels._linear_recurrence.specs import TEST_SPECS


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["linear_recurrence"])
directions = pytest.mark.parametrize("reverse", [False, True])

ODD_SHAPES = [
    ((), 1, 1),
    ((2, 3), 31, 5),
    ((2,), 100, 1),
]
NAMED_SHAPES = [((spec.batch,), spec.seq, spec.d) for spec in TEST_SPECS]
# float64 is the sharper test, so it sees every shape.
SHAPES = [
    *((shape, "float64") for shape in (*ODD_SHAPES, *NAMED_SHAPES)),
    *((shape, "float32") for shape in (ODD_SHAPES[-1], NAMED_SHAPES[-1])),
]


def check(arguments, implementation, dtype, reverse=False):
    """Run in `dtype` and compare both results with the oracle on the same inputs."""
    run = compiled("linear_recurrence", implementation, reverse=reverse)
    with enable_x64(dtype == "float64"):
        inputs = cast(arguments, dtype)
        h, final_state = run(**inputs)
        want_h, want_state = oracles.linear_recurrence(
            **rounded(inputs), reverse=reverse
        )
        length = arguments["x"].shape[-2]
        assert h.dtype == final_state.dtype == inputs["x"].dtype
        assert_close(h, want_h, dtype=dtype, length=length, name="h")
        assert_close(
            final_state, want_state, dtype=dtype, length=length, name="final_state"
        )


@both
@directions
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_odd_shapes(shape, dtype, reverse, implementation):
    check(recurrence_arguments(*shape), implementation, dtype, reverse)


@both
@directions
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complex_values(dtype, reverse, implementation):
    arguments = recurrence_arguments((2,), 65, 3, is_complex=True)
    check(arguments, implementation, dtype, reverse)


@both
@directions
@pytest.mark.parametrize("options", [(), ("initial_state",), ("reset",)], ids=str)
def test_each_option_alone(options, reverse, implementation):
    arguments = recurrence_arguments((2,), 7, 3, options=options)
    check(arguments, implementation, "float32", reverse)


@both
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    inputs = cast(recurrence_arguments((2,), 65, 3), "bfloat16")
    h, final_state = compiled("linear_recurrence", implementation)(**inputs)
    want_h, want_state = oracles.linear_recurrence(**rounded(inputs))
    assert h.dtype == jnp.bfloat16
    assert_rounded(h, want_h, length=65, name="h")
    assert_rounded(final_state, want_state, length=65, name="final_state")


@both
def test_without_jit(implementation):
    inputs = cast(recurrence_arguments((1, 1), 3, 2), "float32")
    h, final_state = linear_recurrence(**inputs, implementation=implementation)
    want_h, want_state = oracles.linear_recurrence(**rounded(inputs))
    assert_close(h, want_h, dtype=np.float32)
    assert_close(final_state, want_state, dtype=np.float32)


@both
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_zero_tiny_and_large_inputs(scale, implementation):
    arguments = recurrence_arguments((2,), 7, 3)
    for name in ("x", "initial_state"):
        arguments[name] = arguments[name] * scale
    check(arguments, implementation, "float32")


@both
def test_decays_of_zero_one_and_above_one(implementation):
    arguments = recurrence_arguments((2,), 7, 3)
    arguments["a"] = np.broadcast_to([0.0, 1.0, -3.0], (2, 7, 3))
    check(arguments, implementation, "float32")


@both
@directions
def test_a_reset_hides_what_overflowed_before_it(reverse, implementation):
    arguments = recurrence_arguments((2,), 7, 3)
    arguments["reset"] = np.arange(7) == np.full((2, 1), 3)
    clean = cast(arguments, "float32")
    spoiled = dict(clean, x=clean["x"].at[:, 5 if reverse else 1].set(jnp.inf))
    run = compiled("linear_recurrence", implementation, reverse=reverse)
    h, final_state = run(**spoiled)
    want_h, want_state = oracles.linear_recurrence(**rounded(clean), reverse=reverse)
    kept = slice(0, 4) if reverse else slice(3, 7)
    assert_close(h[:, kept], want_h[:, kept], dtype=np.float32, length=7)
    assert_close(final_state, want_state, dtype=np.float32, length=7)


@both
def test_vmap_over_batch_is_the_batched_call(implementation):
    inputs = cast(recurrence_arguments((3,), 7, 2), "float32")
    run = compiled("linear_recurrence", implementation)
    mapped = jax.jit(jax.vmap(lambda one: run(**one)))(inputs)
    want = oracles.linear_recurrence(**rounded(inputs))
    for got, expected in zip(mapped, want, strict=True):
        assert_close(got, expected, dtype=np.float32, length=7)


SEQ = 7
seeds = st.integers(0, 2**32 - 1)
inside = st.integers(1, SEQ - 1)


def sliced(inputs, start, stop):
    timed = ("a", "x", "reset")
    return {
        name: values[:, start:stop] if name in timed else values
        for name, values in inputs.items()
    }


@both
@directions
@given(seed=seeds, at=inside)
def test_a_run_may_be_split_anywhere(implementation, reverse, seed, at):
    inputs = cast(recurrence_arguments((2,), SEQ, 3, seed=seed), "float32")
    run = compiled("linear_recurrence", implementation, reverse=reverse)
    early, late = sliced(inputs, 0, at), sliced(inputs, at, SEQ)
    if reverse:
        second, state = run(**late)
        first, final = run(**dict(early, initial_state=state))
    else:
        first, state = run(**early)
        second, final = run(**dict(late, initial_state=state))
    want_h, want_state = oracles.linear_recurrence(**rounded(inputs), reverse=reverse)
    h = jnp.concatenate([first, second], axis=1)
    assert_close(h, want_h, dtype=np.float32, length=SEQ)
    assert_close(final, want_state, dtype=np.float32, length=SEQ)


@both
@directions
@given(
    seed=seeds,
    resets=st.lists(st.booleans(), min_size=2 * SEQ, max_size=2 * SEQ),
    scale=st.floats(0.0, 1.5, width=32),
)
def test_any_values_and_any_resets(implementation, reverse, seed, resets, scale):
    arguments = recurrence_arguments((2,), SEQ, 3, seed=seed)
    arguments["reset"] = np.array(resets).reshape(2, SEQ)
    arguments["a"] = arguments["a"] * scale
    check(arguments, implementation, "float32", reverse)
