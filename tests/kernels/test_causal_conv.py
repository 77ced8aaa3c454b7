"""The causal convolution's values, against the NumPy loop."""

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
    conv_arguments,
    rounded,
)
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import causal_conv
from capibara_eqx.kernels._causal_conv.specs import TEST_SPECS


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["causal_conv"])

# batch, seq, c_in, c_out, width, groups, dilation
ODD_SHAPES = [
    ((), 1, 1, 1, 1, 1, 1),
    ((1,), 2, 3, 3, 4, 3, 1),
    ((2, 3), 31, 4, 6, 3, 2, 2),
    ((2,), 33, 3, 3, 4, 3, 3),
    ((1,), 100, 1, 5, 5, 1, 1),
]
NAMED_SHAPES = [
    ((s.batch,), s.seq, s.c_in, s.c_out, s.width, s.groups, s.dilation)
    for s in TEST_SPECS
]
# float64 is the sharper test, so it sees every shape.
SHAPES = [
    *((shape, "float64") for shape in (*ODD_SHAPES, *NAMED_SHAPES)),
    *((shape, "float32") for shape in (ODD_SHAPES[-1], NAMED_SHAPES[-1])),
]


def terms(arguments):
    """How many products one output adds up."""
    return arguments["weight"][0].size + 1


def check(arguments, implementation, dtype, **static):
    """Run in `dtype` and compare both results with the oracle on the same inputs."""
    run = compiled("causal_conv", implementation, **static)
    with enable_x64(dtype == "float64"):
        inputs = cast(arguments, dtype)
        y, final_state = run(**inputs)
        want_y, want_state = oracles.causal_conv(**rounded(inputs), **static)
        assert y.dtype == final_state.dtype == dtype
        assert_close(y, want_y, dtype=dtype, length=terms(arguments), name="y")
        # The final state is a copy of inputs, so it is exact.
        np.testing.assert_array_equal(np.asarray(final_state), want_state)
    if "segment_ids" in arguments:
        assert np.all(np.asarray(y)[arguments["segment_ids"] < 0] == 0.0)


@both
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_every_option_in_odd_shapes(shape, dtype, implementation):
    *sizes, groups, dilation = shape
    static = {"groups": groups, "dilation": dilation}
    check(conv_arguments(*sizes, **static), implementation, dtype, **static)


@both
@pytest.mark.parametrize("option", [None, "bias", "initial_state", "segment_ids"])
def test_each_option_alone(option, implementation):
    options = () if option is None else (option,)
    static = {"groups": 2, "dilation": 2}
    arguments = conv_arguments((2,), 9, 4, 6, 3, options=options, **static)
    check(arguments, implementation, "float32", **static)


@both
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    inputs = cast(conv_arguments((2,), 33, 16, 3, 4), "bfloat16")
    y, final_state = compiled("causal_conv", implementation)(**inputs)
    want_y, want_state = oracles.causal_conv(**rounded(inputs))
    assert y.dtype == final_state.dtype == jnp.bfloat16
    assert_rounded(y, want_y, length=65, name="y")
    np.testing.assert_array_equal(np.asarray(final_state, np.float64), want_state)


@both
def test_without_jit(implementation):
    inputs = cast(conv_arguments((1, 1), 5, 2, 3, 2), "float32")
    y, final_state = causal_conv(**inputs, implementation=implementation)
    want_y, want_state = oracles.causal_conv(**rounded(inputs))
    assert_close(y, want_y, dtype=np.float32, length=5)
    np.testing.assert_array_equal(np.asarray(final_state), np.float32(want_state))


ROWS = {
    "left padding": [-1, -1, -1, 4, 4, 4, 4],
    "right padding": [4, 4, 4, 4, -1, -1, -1],
    "padding in the middle of a document": [0, 0, -1, -1, 0, 0, 0],
    "padding between documents": [0, 0, -1, 1, 1, -2, 2],
    "documents shorter than the kernel": [0, 1, 2, 3, 4, 5, 6],
    "an id that comes back": [0, 0, 1, 1, 0, 0, 0],
    "an id that comes back after padding": [0, 0, -1, 1, -1, 0, 0],
    "nothing but padding": [-1, -1, -1, -2, -2, -1, -1],
    "one token": [-1, -1, -1, 7, -1, -1, -1],
}


@both
@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS.keys())
def test_packed_documents_and_padding(ids, implementation):
    arguments = conv_arguments((1,), 7, 2, 2, 3)
    arguments["segment_ids"] = np.array([ids], np.int32)
    check(arguments, implementation, "float32")


@both
def test_what_stands_in_padding_does_not_matter(implementation):
    arguments = conv_arguments((2,), 31, 3, 4, 3, seed=1)
    clean = cast(arguments, "float32")
    padding = (clean["segment_ids"] < 0)[..., None]
    spoiled = dict(clean, x=jnp.where(padding, jnp.nan, clean["x"]))
    y, final_state = compiled("causal_conv", implementation)(**spoiled)
    want_y, want_state = oracles.causal_conv(**rounded(clean))
    assert np.any(arguments["segment_ids"] < 0)
    assert_close(y, want_y, dtype=np.float32, length=10)
    np.testing.assert_array_equal(np.asarray(final_state), np.float32(want_state))


@both
def test_what_overflowed_stays_in_its_own_document(implementation):
    arguments = conv_arguments((2,), 7, 2, 2, 3)
    arguments["segment_ids"] = np.array([[0, 0, 0, 1, 1, 1, 1]] * 2, np.int32)
    clean = cast(arguments, "float32")
    spoiled = dict(clean, x=clean["x"].at[:, 2].set(jnp.inf))
    y, final_state = compiled("causal_conv", implementation)(**spoiled)
    want_y, want_state = oracles.causal_conv(**rounded(clean))
    assert_close(y[:, 3:], want_y[:, 3:], dtype=np.float32, length=7)
    np.testing.assert_array_equal(np.asarray(final_state), np.float32(want_state))


@both
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_zero_tiny_and_large_inputs(scale, implementation):
    arguments = conv_arguments((2,), 7, 2, 2, 3)
    for name in ("x", "bias", "initial_state"):
        arguments[name] = (arguments[name] * scale).astype(np.float32).astype(float)
    check(arguments, implementation, "float32")


@both
def test_vmap_over_batch_and_over_weights(implementation):
    rows = [conv_arguments((), 7, 2, 3, 3, seed=seed) for seed in range(3)]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    inputs = cast(stacked, "float32")
    run = compiled("causal_conv", implementation)
    y, final_state = jax.jit(jax.vmap(lambda one: run(**one)))(inputs)
    for row in range(3):
        own = {name: values[row] for name, values in rounded(inputs).items()}
        want_y, want_state = oracles.causal_conv(**own)
        assert_close(y[row], want_y, dtype=np.float32, length=7)
        assert_close(final_state[row], want_state, dtype=np.float32)


SEQ = 7
seeds = st.integers(0, 2**32 - 1)
identifiers = st.lists(st.integers(-2, 2), min_size=SEQ, max_size=SEQ)


@both
@given(seed=seeds, ids=st.lists(identifiers, min_size=2, max_size=2))
def test_any_values_and_any_segments(implementation, seed, ids):
    arguments = conv_arguments((2,), SEQ, 2, 3, 3, dilation=2, seed=seed)
    arguments["segment_ids"] = np.array(ids, np.int32)
    check(arguments, implementation, "float32", dilation=2)


@both
@given(seed=seeds, at=st.sampled_from([1, 2, 5, 6]), ids=identifiers)
def test_a_run_may_be_split_anywhere(implementation, seed, at, ids):
    arguments = conv_arguments((), SEQ, 2, 3, 3, seed=seed)
    arguments["segment_ids"] = np.array(ids, np.int32)
    inputs = cast(arguments, "float32")
    run = compiled("causal_conv", implementation)
    timed = ("x", "segment_ids")
    early = {n: v[:at] if n in timed else v for n, v in inputs.items()}
    late = {n: v[at:] if n in timed else v for n, v in inputs.items()}
    first, state = run(**early)
    before = [identifier for identifier in ids[:at] if identifier >= 0]
    after = [identifier for identifier in ids[at:] if identifier >= 0]
    if before and after and before[-1] != after[0]:
        # The second part opens with a new document, which has no past.
        state = jnp.zeros_like(state)
    second, final = run(**dict(late, initial_state=state))
    want_y, want_state = oracles.causal_conv(**rounded(inputs))
    y = jnp.concatenate([first, second])
    assert_close(y, want_y, dtype=np.float32, length=7)
    np.testing.assert_array_equal(np.asarray(final), np.float32(want_state))
