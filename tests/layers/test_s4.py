"""The S4 layer's values and derivatives, against dense matrices in NumPy and SciPy."""

import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy import signal
from support.derivatives import check_first_order, check_gradient, check_second_order
from support.layer_cases import packed_rows, seeds
from support.messages import refused
from support.precision import enable_x64
from support.state_space_oracle import (
    from_pairs,
    kernel_of,
    losses_of,
    moved,
    parameters,
    parameters_that_decay,
    point_of,
    read,
    s4_step,
    state_space_packed,
    state_space_row,
)
from support.tolerances import assert_close

from capibara_eqx.layers import S4, hippo_diagonal, hippo_matrices


# Rows longer than a chunk, with a rest.
SEQ = 11
OPTIONS: dict[str, dict[str, Any]] = {
    "convolution": {"chunk_size": 4},
    # A power of which the binary digits are ones.
    "chunked": {"chunk_size": 3, "measure": "legt"},
    "recurrent": {},
}


@functools.cache
def make(mode, d_model=2, d_state=4, **options):
    options = {"dt_min": 0.1, "dt_max": 0.5, **OPTIONS[mode], **options}
    layer = S4(d_model, d_state, mode=mode, key=jax.random.key(0), **options)
    return moved(layer, 0)


def losses(layer, seq):
    return losses_of(layer, seq, s4_step)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("convolution", "float32"),
        ("chunked", "float64"),
        ("recurrent", "float64"),
        pytest.param("convolution", "float64", marks=pytest.mark.slow),
        pytest.param("chunked", "float32", marks=pytest.mark.slow),
        pytest.param("recurrent", "float32", marks=pytest.mark.slow),
    ],
)
def test_values_are_those_of_dense_matrices(mode, dtype):
    with enable_x64(dtype == "float64"):
        layer = make(mode)
        point = point_of(layer, 1, SEQ, state=mode != "convolution")
        cast = {name: jnp.asarray(value, dtype) for name, value in point.items()}
        y, state = jax.jit(lambda point: read(layer, point))(cast)
        rounded = {name: np.asarray(value, "float64") for name, value in cast.items()}
        close = functools.partial(assert_close, dtype=dtype, length=SEQ * 16)
        before = rounded.get("state", np.zeros((layer.d_model, layer.d_state)))
        want, last = state_space_row(rounded, s4_step(rounded), rounded["x"], before)
        assert {y.dtype, state.dtype} == {jnp.dtype(dtype)}
        close(y, want, name="y")
        if "state" in point:
            close(state, last, name="state")


@pytest.mark.parametrize(
    ("measure", "length"), [("legs", 1), ("legs", 130), ("legt", 8)]
)
def test_the_kernel_at_the_start_is_that_of_hippo(measure, length):
    """Of the real matrix, which SciPy turns into steps."""
    with enable_x64():
        layer = S4(1, 6, measure, dt_min=0.1, dtype="float64", key=jax.random.key(0))
        split = hippo_diagonal(6, measure, "float64")
        A, B = (np.asarray(part) for part in hippo_matrices(6, measure, "float64"))
        kernel = kernel_of(layer, length)[:, 0]
        params = {name: value[0] for name, value in parameters(layer).items()}
    if measure == "legt":
        A = A - 1e-4 * np.eye(6)  # the layer's normal part decays
    C = 2 * np.real(from_pairs(params[".C"]) @ np.conj(np.asarray(split.V)).T)[None]
    continuous: Any = (A, B[:, None], C, np.zeros((1, 1)))
    step = np.exp(params[".log_dt"])
    steps: Any = signal.cont2discrete(continuous, step, method="bilinear")
    A, B = steps[:2]
    impulse = np.arange(length) == 0
    # SciPy's outputs are those of the state in front of a token.
    y = signal.dlsim((A, B, C @ A, C @ B, 1.0), impulse)[1]
    assert_close(kernel, y[:, 0], dtype="float64", length=1000)


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loops(rows, seed):
    layer = make("convolution")
    x = np.random.default_rng(seed).standard_normal((len(rows), 2)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    params = parameters(layer)
    want = state_space_packed(params, s4_step(params), x, ids, 4)
    assert_close(y, want, dtype="float32", length=100)


@pytest.mark.parametrize(
    "check",
    [check_gradient, pytest.param(check_first_order, marks=pytest.mark.slow)],
)
def test_first_derivatives_in_chunks_and_through_caches(check):
    layer = make("chunked", 1, 2, chunk_size=2)
    check(*losses(layer, 5), point_of(layer, 2, 5))


def test_first_derivatives_of_the_convolution():
    layer = make("convolution", 2, 2, chunk_size=2)
    check_gradient(*losses(layer, 5), point_of(layer, 2, 5, state=False))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["chunked", "convolution"])
def test_second_derivatives(mode):
    layer = make(mode, 1, 2, chunk_size=2)
    point = point_of(layer, 3, 3, state=mode == "chunked")
    check_second_order(*losses(layer, 3), point)


OTHERS: dict[str, Any] = {
    "d_model": 3,
    "d_state": 6,
    "measure": "legt",
    "dt_min": 0.3,
    "dt_max": 0.9,
    "dropout_rate": 0.5,
    "mode": "recurrent",
    "chunk_size": 3,
    "dtype": jnp.bfloat16,
    "key": jax.random.key(1),
}


def test_every_argument_is_tested():
    assert sorted(inspect.signature(S4).parameters) == sorted(OTHERS)


def describe(**change):
    """The computation as a program, with the numbers that it holds."""
    arguments = {"d_model": 2, "d_state": 4, "dt_min": 0.1, "dt_max": 0.5}
    layer = S4(**{**arguments, "key": jax.random.key(0), **change})
    x = jnp.ones((5, layer.d_model))
    call = lambda layer, x: layer(x, key=jax.random.key(2))
    program, *_ = eqx.filter_make_jaxpr(call)(layer, x)
    return str(program), [value.tolist() for value in parameters(layer).values()]


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_changes_the_layer(name):
    program, numbers = describe()
    other_program, other_numbers = describe(**{name: OTHERS[name]})
    assert program != other_program or numbers != other_numbers


def test_weight_decay_leaves_the_dynamics_alone():
    decaying = parameters_that_decay(make("chunked"))
    assert decaying == {".C", ".output.proj.weight"}


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"d_state": 5}, ["`d_state`", "even", "5", "pairs"]),
        ({"measure": "legz"}, ["`measure`", "'legz'", "Did you mean"]),
        ({"mode": "chunks"}, ["`mode`", "'chunks'", "Did you mean 'chunked'"]),
        ({"dt_min": 0.2, "dt_max": 0.1}, ["dt_min", "dt_max", "swapped"]),
        ({"dropout_rate": -0.5}, ["`dropout_rate`", "-0.5"]),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with refused(*words):
        S4(**{"d_model": 4, "key": jax.random.key(0), **arguments})
