"""The S4D layer's values and derivatives, against NumPy loops in float64 and SciPy."""

import functools
import inspect
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy import signal
from support.derivatives import (
    check_first_order,
    check_gradient,
    check_second_order,
)
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
    s4d_step,
    s4d_steps,
    state_space_packed,
    state_space_row,
    with_parameters,
)
from support.tolerances import assert_close

from capibara_eqx.layers import S4D, Dropout, hippo_matrices


# Rows longer than a chunk, with a rest.
SEQ = 11
OPTIONS: dict[str, dict[str, Any]] = {
    "convolution": {"chunk_size": 4},
    "chunked": {"chunk_size": 4, "init": "legs", "discretization": "bilinear"},
    "recurrent": {"init": "inv"},
}


@functools.cache
def make(mode, d_model=3, d_state=4, **options):
    options = {"dt_min": 0.1, "dt_max": 0.5, **OPTIONS[mode], **options}
    layer = S4D(d_model, d_state, mode=mode, key=jax.random.key(0), **options)
    return moved(layer, 0)


def losses(layer, seq):
    return losses_of(layer, seq, lambda point: s4d_step(point, layer.discretization))


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
def test_values_are_those_of_the_loops(mode, dtype):
    with enable_x64(dtype == "float64"):
        layer = make(mode)
        point = point_of(layer, 1, SEQ, state=mode != "convolution")
        cast = {name: jnp.asarray(value, dtype) for name, value in point.items()}
        y, state = jax.jit(lambda point: read(layer, point))(cast)
        called = jax.jit(lambda point: with_parameters(layer, point)(point["x"]))(cast)
        assert {y.dtype, state.dtype, called.dtype} == {jnp.dtype(dtype)}
        rounded = {name: np.asarray(value, "float64") for name, value in cast.items()}
        step = s4d_step(rounded, layer.discretization)
        zeros = np.zeros((layer.d_model, layer.d_state))
        close = functools.partial(assert_close, dtype=dtype, length=SEQ * 4 + 8)
        want, _ = state_space_row(rounded, step, rounded["x"], zeros)
        close(called, want, name="call")
        if "state" in point:
            want, last = state_space_row(rounded, step, rounded["x"], rounded["state"])
            close(y, want, name="y")
            close(state, last, name="state")


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loops(rows, seed):
    layer = make("convolution")
    x = np.random.default_rng(seed).standard_normal((len(rows), 3)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    params = parameters(layer)
    want = state_space_packed(params, s4d_step(params, "zoh"), x, ids, 4)
    assert_close(y, want, dtype="float32", length=60)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_may_have_no_rows(packed):
    x = jnp.zeros((2, 0, SEQ, 3))
    ids = jnp.zeros(x.shape[:-1], "int32") if packed else None
    assert compiled_call()(make("chunked"), x, ids).shape == x.shape


def test_documents_are_safe_from_each_other():
    layer, ids = make("convolution"), np.asarray([0, 0, 1, 1, 1, 2], "int32")
    x = np.random.default_rng(0).standard_normal((6, 3)).astype("float32")
    want = np.asarray(compiled_call()(layer, x, ids))
    x[2] = np.nan
    y = np.asarray(compiled_call()(layer, x, ids))
    np.testing.assert_array_equal(y[[0, 1, 5]], want[[0, 1, 5]])
    assert np.all(np.isnan(y[2:5]))


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_the_response_of_a_channel_is_that_of_scipy(discretization):
    """Of the system with real matrices, which SciPy turns into steps."""
    u = np.random.default_rng(0).standard_normal(9)
    with enable_x64():
        layer = make("chunked", 1, 4, discretization=discretization)
        values = parameters(layer).items()
        layer = with_parameters(layer, {k: v.astype("float64") for k, v in values})
        params = {name: value[0] for name, value in parameters(layer).items()}
        kernel = np.asarray(kernel_of(layer, 9))[:, 0]
    real, imag = -np.exp(params[".log_A_real"]), params[".A_imag"]
    A = np.block([[np.diag(real), -np.diag(imag)], [np.diag(imag), np.diag(real)]])
    B = np.repeat([[1.0], [0.0]], 2, axis=0)
    C = from_pairs(params[".C"])
    C = np.concatenate([2 * np.real(C), -2 * np.imag(C)])[None]
    continuous: Any = (A, B, C, np.zeros((1, 1)))
    step = np.exp(params[".log_dt"])
    steps: Any = signal.cont2discrete(continuous, step, method=discretization)
    A, B = steps[:2]
    # SciPy's outputs are those of the state in front of a token.
    y = signal.dlsim((A, B, C @ A, C @ B, 1.0), u)[1]
    got = np.convolve(u, kernel)[:9]
    assert_close(got, y[:, 0], dtype="float64", length=100)


@pytest.mark.parametrize("length", [1, 37])
def test_the_kernel_is_that_of_powers(length):
    layer = make("chunked", 2, 6)
    params = parameters(layer)
    A, B = s4d_steps(params, "bilinear")
    C = from_pairs(params[".C"])
    t = np.arange(length)[:, None, None]
    want = 2 * np.sum((C * B)[None] * A[None] ** t, axis=-1).real
    got = kernel_of(layer, length)
    assert_close(got, want, dtype="float32", length=length * 6)


def test_a_convolution_does_not_come_around():
    layer = make("convolution", 2, 2, chunk_size=1, dt_min=1e-4, dt_max=1e-4)
    # Slow decay: around the end of a row of 7 there would be much left.
    x = np.zeros((7, 2), "float32")
    x[-1] = 1e3
    call = jax.jit(lambda x: layer(x))
    silent, y = call(np.zeros_like(x)), call(x)
    assert np.min(np.abs(kernel_of(layer, 7))) > 1e-5
    assert_close(y[:-1], silent[:-1], dtype="float32", terms=1e3 * 1e-4)
    assert np.all(np.abs(y[-1] - silent[-1]) > 1)


def test_first_derivatives_in_chunks_and_through_caches():
    layer = make("chunked", 2, 4, chunk_size=2)
    check_first_order(*losses(layer, 5), point_of(layer, 2, 5))


def test_first_derivatives_of_the_convolution():
    layer = make("convolution", 2, 2, chunk_size=2)
    check_gradient(*losses(layer, 5), point_of(layer, 2, 5, state=False))


@pytest.mark.parametrize("mode", ["chunked", "convolution"])
@pytest.mark.slow
def test_second_derivatives(mode):
    layer = make(mode, 1, 2, chunk_size=2)
    point = point_of(layer, 3, 3, state=mode == "chunked")
    check_second_order(*losses(layer, 3), point)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_small_steps_do_not_cancel(method):
    layer = make("chunked", 1, 2, discretization=method, dt_min=1e-6, dt_max=1e-6)
    params = parameters(layer)
    A, B = s4d_steps(params, method)
    first = 2 * np.sum(from_pairs(params[".C"]) * B, axis=-1).real
    np.testing.assert_allclose(kernel_of(layer, 1)[0], first, rtol=1e-5)


def poles(init, d_state=6, d_model=2):
    layer = S4D(d_model, d_state, init, key=jax.random.key(0))
    real, imag = -np.exp(np.asarray(layer.log_A_real)), np.asarray(layer.A_imag)
    np.testing.assert_array_equal(real, np.broadcast_to(real[0], real.shape))
    np.testing.assert_array_equal(imag, np.broadcast_to(imag[0], imag.shape))
    return real[0] + 1j * imag[0]


@pytest.mark.parametrize(
    ("init", "imaginary"),
    [
        ("lin", [0, math.pi, 2 * math.pi]),
        ("inv", [6 / math.pi * (6 / k - 1) for k in (1, 3, 5)]),
        ("quad", [1 / math.pi, 9 / math.pi, 25 / math.pi]),
    ],
)
def test_poles_at_the_start(init, imaginary):
    np.testing.assert_allclose(poles(init), -0.5 + 1j * np.array(imaginary), rtol=1e-6)


def test_poles_of_legs_are_eigenvalues():
    A, _ = hippo_matrices(6)
    low = np.sqrt(np.arange(6) + 0.5)
    eigenvalues = np.linalg.eigvals(np.asarray(A, "float64") + np.outer(low, low))
    kept = eigenvalues[eigenvalues.imag > 0]
    want = kept[np.argsort(kept.imag)]
    np.testing.assert_allclose(poles("legs"), want, rtol=1e-5)


def test_the_rest_at_the_start():
    layer = S4D(200, 16, dt_min=0.01, dt_max=0.02, key=jax.random.key(0))
    dt = np.exp(np.asarray(layer.log_dt, "float64"))
    assert dt.min() >= 0.01 * (1 - 1e-5)
    assert dt.max() <= 0.02 * (1 + 1e-5)
    assert abs(np.mean(np.log(dt)) - np.log(0.01 * 0.02) / 2) < 0.05
    assert abs(np.mean(np.sum(np.square(layer.C), axis=-1)) - 1) < 0.1
    assert abs(np.std(layer.D) - 1) < 0.2
    narrow = S4D(2, 2, dtype=jnp.bfloat16, key=jax.random.key(0))
    names = {name: value.dtype.name for name, value in parameters(narrow).items()}
    half = {name for name, dtype in names.items() if dtype == "bfloat16"}
    assert half == {".output.proj.weight", ".output.proj.bias"}
    assert set(names.values()) == {"bfloat16", "float32"}


OTHERS: dict[str, Any] = {
    "d_model": 3,
    "d_state": 6,
    "init": "quad",
    "discretization": "bilinear",
    "dt_min": 0.3,
    "dt_max": 0.9,
    "dropout_rate": 0.5,
    "mode": "recurrent",
    "chunk_size": 3,
    "dtype": jnp.bfloat16,
    "key": jax.random.key(1),
}


def test_every_argument_is_tested():
    assert sorted(inspect.signature(S4D).parameters) == sorted(OTHERS)


def describe(**change):
    """The computation as a program, with the numbers that it holds."""
    arguments = {"d_model": 2, "d_state": 4, "dt_min": 0.1, "dt_max": 0.5}
    layer = S4D(**{**arguments, "key": jax.random.key(0), **change})
    x = jnp.ones((5, layer.d_model))
    call = lambda layer, x: layer(x, key=jax.random.key(2))
    program, *_ = eqx.filter_make_jaxpr(call)(layer, x)
    return str(program), [value.tolist() for value in parameters(layer).values()]


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_changes_the_layer(name):
    program, numbers = describe()
    other_program, other_numbers = describe(**{name: OTHERS[name]})
    assert program != other_program or numbers != other_numbers


def test_dropout_is_active_with_a_key_and_never_in_a_stream():
    layer = make("recurrent", 2, 2, dropout_rate=0.5)
    plain = make("recurrent", 2, 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)), "float32")
    call = eqx.filter_jit(lambda layer, x, key: layer(x, key=key))
    one, same, other = (call(layer, x, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    assert isinstance(layer.output.dropout, Dropout)
    want = call(plain, x, None)
    np.testing.assert_array_equal(call(eqx.nn.inference_mode(layer), x, None), want)
    prefill = eqx.filter_jit(lambda layer, x: layer.prefill(x, layer.init_cache())[0])
    np.testing.assert_array_equal(prefill(layer, x), prefill(plain, x))


def test_weight_decay_leaves_the_dynamics_alone():
    decaying = parameters_that_decay(make("chunked"))
    assert decaying == {".C", ".output.proj.weight"}


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"d_model": 0}, ["`d_model`", "positive", "0"]),
        ({"d_state": 5}, ["`d_state`", "even", "5", "pairs"]),
        ({"chunk_size": 0}, ["`chunk_size`", "positive"]),
        ({"init": "lim"}, ["`init`", "'lim'", "Did you mean 'lin'"]),
        ({"discretization": "zho"}, ["`discretization`", "Did you mean 'zoh'"]),
        ({"mode": "recurent"}, ["`mode`", "Did you mean 'recurrent'"]),
        ({"dt_min": 0.0}, ["`dt_min`", "positive"]),
        ({"dt_min": 0.2, "dt_max": 0.1}, ["dt_min", "dt_max", "swapped"]),
        ({"dropout_rate": 1.5}, ["`dropout_rate`", "1.5"]),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with refused(*words):
        S4D(**{"d_model": 4, "key": jax.random.key(0), **arguments})


@pytest.mark.errors
def test_bad_calls_are_refused():
    layer = S4D(4, 2, dropout_rate=0.1, key=jax.random.key(0))
    with refused("`length`", "positive"):
        layer.kernel(0)
    with refused("`key`", "inference_mode"):
        layer(jnp.zeros((3, 4)))
