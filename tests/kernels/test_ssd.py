"""The state space dual's values, against the NumPy loop."""

import functools

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
    rounded,
    ssd_arguments,
)
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import ssd
from capibara_eqx.kernels._ssd.specs import TEST_SPECS


each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["ssd"])
chunked = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["ssd"][1:])

ODD_SHAPES = [((), 1, 1, 1, 1, 1), ((2, 3), 5, 2, 3, 2, 1)]
NAMED_SHAPES = [((spec.batch,), *spec[2:]) for spec in TEST_SPECS]
# float64 is the sharper test, so it sees every shape.
SHAPES = [
    *((shape, "float64") for shape in (*ODD_SHAPES, *NAMED_SHAPES)),
    (NAMED_SHAPES[-1], "float32"),
]


def check(arguments, implementation, dtype, chunk_size=None):
    """Run in `dtype` and compare both results with the oracle on the same inputs."""
    run = compiled("ssd", implementation, chunk_size=chunk_size)
    with enable_x64(dtype == "float64"):
        inputs = cast(arguments, dtype)
        y, final_state = run(**inputs)
        want_y, want_state = oracles.ssd(**rounded(inputs))
        assert y.dtype == final_state.dtype == dtype
        length = arguments["x"].shape[-3] + arguments["B"].shape[-1]
        assert_close(y, want_y, dtype=dtype, length=length, name="y")
        assert_close(
            final_state, want_state, dtype=dtype, length=length, name="final_state"
        )


@each
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_every_option_in_odd_shapes(shape, dtype, implementation):
    check(ssd_arguments(*shape), implementation, dtype)


@each
@pytest.mark.parametrize(
    "options", [(), ("coefficient",), ("initial_state",), ("reset",)], ids=str
)
def test_each_option_alone(options, implementation):
    check(
        ssd_arguments((2,), 7, 4, 2, 2, 3, options=options), implementation, "float32"
    )


@chunked
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7, 100])
def test_chunks_of_any_size(chunk_size, implementation):
    check(ssd_arguments((2,), 7, 4, 2, 2, 3), implementation, "float64", chunk_size)


@each
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    inputs = cast(ssd_arguments((2,), 33, 2, 3, 1, 4), "bfloat16")
    y, final_state = compiled("ssd", implementation, chunk_size=8)(**inputs)
    want_y, want_state = oracles.ssd(**rounded(inputs))
    assert y.dtype == jnp.bfloat16
    assert final_state.dtype == jnp.float32
    assert_rounded(y, want_y, length=37, name="y")
    assert_rounded(final_state, want_state, length=37, name="final_state")


@each
def test_without_jit(implementation):
    inputs = cast(ssd_arguments((1, 1), 3, 2, 2, 1, 2), "float32")
    y, final_state = ssd(**inputs, implementation=implementation)
    want_y, want_state = oracles.ssd(**rounded(inputs))
    assert_close(y, want_y, dtype=np.float32)
    assert_close(final_state, want_state, dtype=np.float32)


@each
def test_decays_too_large_for_their_inverse(implementation):
    """The other half of the differences would overflow, and so would its gradient."""
    arguments = ssd_arguments((2,), 7, 2, 2, 1, 3)
    arguments["log_decay"] = arguments["log_decay"] * 200
    check(arguments, implementation, "float32")
    inputs = cast(arguments, "float32")
    known = {"reset": inputs.pop("reset")}
    run = compiled("ssd", implementation, chunk_size=None)
    gradient = jax.grad(lambda point: jnp.sum(run(**point, **known)[0] ** 2))(inputs)
    assert all(np.all(np.isfinite(values)) for values in gradient.values())


# Chunks of three tokens: the reset is inside the second.
@each
@pytest.mark.parametrize("name", ["x", "B", "C", "coefficient", "initial_state"])
def test_a_reset_hides_what_overflowed_before_it(name, implementation):
    arguments = ssd_arguments((2,), 9, 2, 2, 1, 3)
    arguments["reset"] = np.arange(9) == np.full((2, 1), 4)
    clean = cast(arguments, "float32")
    at = (0, 0, 1, 0) if name == "initial_state" else (0, 1)
    spoiled = dict(clean, **{name: clean[name].at[at].set(jnp.inf)})
    run = compiled("ssd", implementation, chunk_size=3)
    y, final_state = run(**spoiled)
    want_y, want_state = oracles.ssd(**rounded(clean))
    assert_close(final_state, want_state, dtype=np.float32, length=12)
    assert_close(y[:, 4:], want_y[:, 4:], dtype=np.float32, length=12)
    assert_close(y[1], want_y[1], dtype=np.float32, length=12)
    assert not np.all(np.isfinite(y[0, :4]))


@chunked
@pytest.mark.parametrize("name", ["x", "B", "C", "coefficient", "initial_state"])
def test_gradients_do_not_pass_what_overflowed(name, implementation):
    arguments = ssd_arguments((), 9, 2, 2, 1, 3)
    arguments["reset"] = np.arange(9) == 4
    clean = cast(arguments, "float32")
    at = (0, 1, 0) if name == "initial_state" else (1,)
    reset = clean.pop("reset")

    def gradient(point):
        def loss(point):
            run = compiled("ssd", implementation, chunk_size=3)
            y, h = run(**point, reset=reset)
            return jnp.sum(y[4:] ** 2) + jnp.sum(h**2)

        found = jax.grad(loss)(point)
        found.pop("initial_state")
        return {name: values[4:] for name, values in found.items()}

    spoiled = dict(clean, **{name: clean[name].at[at].set(jnp.inf)})
    got, want = gradient(spoiled), gradient(clean)
    for part, values in want.items():
        np.testing.assert_array_equal(got[part], values, err_msg=part)


@each
@pytest.mark.parametrize("decay", [-1e5, -np.inf])
def test_a_decay_to_nothing_forgets_and_takes_no_digits(decay, implementation):
    arguments = ssd_arguments((2,), 7, 2, 2, 1, 3, options=("initial_state",))
    arguments["log_decay"][:, 2] = decay
    check(arguments, implementation, "float32")


@each
def test_vmap_over_batch_is_the_batched_call(implementation):
    inputs = cast(ssd_arguments((3,), 7, 2, 2, 1, 2), "float32")
    run = compiled("ssd", implementation, chunk_size=4)
    mapped = jax.jit(jax.vmap(lambda one: run(**one)))(inputs)
    for got, want in zip(mapped, oracles.ssd(**rounded(inputs)), strict=True):
        assert_close(got, want, dtype=np.float32, length=9)


def test_mamba3_trapezoid_is_two_calls():
    r"""$e^{a_t} h_{t-1} + \beta_t x_{t-1} B_{t-1}^\top + \gamma_t x_t B_t^\top$."""
    arguments = ssd_arguments((), 9, 2, 3, 1, 2, options=("coefficient",))
    x, log_decay, B, C, gamma = (rounded(arguments)[n] for n in arguments)
    beta = np.cos(gamma)
    h, want = np.zeros((2, 3, 2)), np.zeros(x.shape)
    for t in range(9):
        h = np.exp(log_decay[t])[:, None, None] * h
        h += gamma[t, :, None, None] * x[t, :, :, None] * B[t, 0]
        if t > 0:
            h += beta[t, :, None, None] * x[t - 1, :, :, None] * B[t - 1, 0]
        want[t] = h @ C[t, 0]
    run = compiled("ssd", None, chunk_size=4)
    inputs = cast(arguments, "float32")
    before = lambda v: jnp.concatenate([jnp.zeros_like(v[:1]), v[:-1]])
    now, _ = run(**inputs)
    then, _ = run(
        before(inputs["x"]),
        inputs["log_decay"],
        before(inputs["B"]),
        inputs["C"],
        coefficient=jnp.cos(inputs["coefficient"]),
    )
    assert_close(now + then, want, dtype=np.float32, length=20)


SEQ = 7
TIMED = ("x", "log_decay", "B", "C", "coefficient", "reset")


def sliced(inputs, start, stop):
    return {
        name: values[:, start:stop] if name in TIMED else values
        for name, values in inputs.items()
    }


@each
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(1, SEQ - 1))
def test_a_run_may_be_split_anywhere(implementation, seed, at):
    inputs = cast(ssd_arguments((2,), SEQ, 2, 2, 1, 3, seed=seed), "float32")
    run = compiled("ssd", implementation, chunk_size=3)
    first, state = run(**sliced(inputs, 0, at))
    second, final = run(**dict(sliced(inputs, at, SEQ), initial_state=state))
    want_y, want_state = oracles.ssd(**rounded(inputs))
    y = jnp.concatenate([first, second], axis=1)
    assert_close(y, want_y, dtype=np.float32, length=SEQ + 3)
    assert_close(final, want_state, dtype=np.float32, length=SEQ + 3)


@chunked
@given(
    seed=st.integers(0, 2**32 - 1),
    resets=st.lists(st.booleans(), min_size=2 * SEQ, max_size=2 * SEQ),
    scale=st.floats(0.0, 30.0, width=32),
    chunk_size=st.sampled_from([2, 3, SEQ]),
)
def test_any_values_resets_and_chunks(implementation, seed, resets, scale, chunk_size):
    arguments = ssd_arguments((2,), SEQ, 2, 2, 1, 3, seed=seed)
    arguments["reset"] = np.array(resets).reshape(2, SEQ)
    arguments["log_decay"] = arguments["log_decay"] * scale
    check(arguments, implementation, "float32", chunk_size)


# More rows and states than registers hold at once, and neither in whole registers.
WIDE = ssd_arguments((2,), 11, 4, 9, 2, 70, seed=3)


def gradients(arguments, implementation, dtype):
    """Of the results' products with fixed numbers, by every array."""
    run = compiled("ssd", implementation, chunk_size=4)
    with enable_x64(dtype == "float64"):
        inputs = cast(arguments, dtype)
        reset = inputs.pop("reset")

        def loss(point):
            y, final_state = run(**point, reset=reset)
            weights = jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape)
            ends = jnp.sin(jnp.arange(final_state.size, dtype=dtype))
            return jnp.vdot(y, weights) + jnp.vdot(final_state, ends)

        return jax.jit(jax.grad(loss))(inputs)


@functools.cache
def wide_gradients(implementation, dtype):
    return gradients(WIDE, implementation, dtype)


@chunked
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_over_blocks_of_registers(dtype, implementation):
    found = wide_gradients(implementation, dtype)
    for name, want in wide_gradients("reference", "float64").items():
        assert_close(found[name], want, dtype=dtype, length=4 * 9 * 70, name=name)


@chunked
def test_one_token_of_whole_registers_and_a_rest(implementation):
    check(ssd_arguments((2,), 1, 4, 9, 2, 70), implementation, "float32")


SIZES = {
    "no rows": ((0,), 5, 4, 3, 2, 4),
    "no rows, one token": ((2, 0), 1, 4, 3, 2, 4),
    "no heads": ((2,), 5, 0, 3, 2, 4),
    "no channels": ((2,), 5, 4, 0, 2, 4),
    "no channels, one token": ((2,), 1, 4, 0, 2, 4),
    "no states": ((2,), 5, 4, 3, 2, 0),
    "no states, one token": ((2,), 1, 4, 3, 2, 0),
    "nothing": ((0,), 1, 0, 0, 1, 0),
}


# `None`: the default serves them too.
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS["ssd"], None])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_zero(size, implementation):
    arguments = ssd_arguments(*SIZES[size])
    check(arguments, implementation, "float32", chunk_size=4)
    # The results are empty or zero, whatever the arguments.
    for name, values in gradients(arguments, implementation, "float32").items():
        np.testing.assert_array_equal(values, np.zeros(arguments[name].shape), name)
