"""The depthwise convolution with its activation, by everything that fuses the two."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import numpy_oracles as oracles
from support.kernel_cases import (
    IMPLEMENTATIONS,
    cast,
    compiled,
    conv_arguments,
    rounded,
    skip_if_refused,
)
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded


each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["depthwise_conv"])

# batch, seq, channels, width, dilation
SHAPES = [
    ((), 1, 1, 1, 1),
    ((2,), 1, 5, 4, 1),
    ((2, 3), 3, 3, 4, 2),
    ((2,), 33, 6, 3, 3),
    # Several runs of tokens, and more channels than are read together.
    ((1,), 130, 7, 4, 1),
    ((1,), 67, 261, 2, 1),
    # A history longer than what comes after it.
    ((2,), 5, 3, 5, 9),
]


def check(arguments, implementation, dtype, **static):
    skip_if_refused(implementation, dtype)
    run = compiled("depthwise_conv", implementation, **static)
    with enable_x64(dtype == "float64"):
        inputs = cast(arguments, dtype)
        y, final_state = run(**inputs)
        want_y, want_state = oracles.causal_conv(**rounded(inputs), **static)
        assert y.dtype == final_state.dtype == dtype
        # A product and a sum a tap, and the quotient of the activation.
        length = arguments["weight"].shape[-1] + 4
        assert_close(y, want_y, dtype=dtype, length=length, name="y")
        np.testing.assert_array_equal(np.asarray(final_state), want_state)


@each
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "activation", [pytest.param(None, marks=pytest.mark.slow), "silu"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_in_odd_shapes(shape, activation, dtype, implementation):
    batch, seq, channels, width, dilation = shape
    static = {"groups": channels, "dilation": dilation}
    arguments = conv_arguments(batch, seq, channels, channels, width, **static)
    check(arguments, implementation, dtype, activation=activation, **static)


@each
@pytest.mark.parametrize("option", [None, "bias", "initial_state", "segment_ids"])
def test_each_option_alone(option, implementation):
    options = () if option is None else (option,)
    arguments = conv_arguments((2,), 9, 3, 3, 4, groups=3, options=options)
    check(arguments, implementation, "float32", groups=3, activation="silu")


@each
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    arguments = conv_arguments((2,), 33, 3, 3, 4, groups=3, options=("bias",))
    inputs = cast(arguments, "bfloat16")
    run = compiled("depthwise_conv", implementation, groups=3, activation="silu")
    y, _ = run(**inputs)
    want_y, _ = oracles.causal_conv(**rounded(inputs), groups=3, activation="silu")
    assert_rounded(y, want_y, length=8, name="y")


@each
@pytest.mark.parametrize("shift", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_inputs_of_the_activation(shift, implementation):
    arguments = conv_arguments((2,), 7, 3, 3, 2, groups=3, options=("bias",))
    arguments["bias"] = arguments["bias"] + shift
    check(arguments, implementation, "float32", groups=3, activation="silu")


@each
@given(
    seed=st.integers(0, 2**32 - 1),
    at=st.integers(1, 8),
    activation=st.sampled_from([None, "silu"]),
)
def test_a_run_may_be_split_anywhere(implementation, seed, at, activation):
    arguments = conv_arguments(
        (2,), 9, 3, 3, 4, groups=3, options=("bias", "initial_state"), seed=seed
    )
    inputs = cast(arguments, "float32")
    run = compiled("depthwise_conv", implementation, groups=3, activation=activation)
    x = inputs.pop("x")
    first, state = run(x[:, :at], **inputs)
    second, final = run(x[:, at:], **(inputs | {"initial_state": state}))
    want, want_final = oracles.causal_conv(
        **rounded(inputs | {"x": x}), groups=3, activation=activation
    )
    got = np.concatenate([first, second], axis=1)
    assert_close(got, want, dtype=np.float32, length=8)
    np.testing.assert_array_equal(np.asarray(final), want_final)
