"""Inputs of the selective scan that are laid out oddly, empty, or not finite."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import numpy_oracles as oracles
from support.kernel_cases import (
    FUSED,
    cast,
    compiled,
    rounded,
    scan_arguments,
    split_fixed,
)
from support.processes import run_python
from support.tolerances import assert_close

from capibara_eqx.kernels import selective_scan


each = pytest.mark.parametrize("implementation", ["xla", FUSED])
SOFTPLUS: dict[str, Any] = {"delta_softplus": True}
PLAIN: dict[str, Any] = {"delta_softplus": False}
OF_ROWS = ("u", "delta", "B", "C", "z", "initial_state")


def scan(implementation, arguments, **static):
    run = compiled("selective_scan", implementation, **(static or SOFTPLUS))
    return [np.asarray(result) for result in run(**arguments)]


@functools.cache
def gradient(implementation, **static):
    """Of a sum of both results with weights, by every argument but `reset`."""

    def loss(smooth, fixed, weights):
        results = selective_scan(
            **smooth, **fixed, implementation=implementation, **static
        )
        return sum(jnp.sum(w * r) for w, r in zip(weights, results, strict=True))

    return jax.jit(jax.grad(loss))


def gradients(implementation, arguments, **static):
    smooth, fixed = split_fixed(arguments)
    rng = np.random.default_rng(9)
    shapes = (arguments["u"].shape, (*arguments["u"].shape[:-2], *arguments["A"].shape))
    weights = [rng.standard_normal(shape, np.float32) for shape in shapes]
    found = gradient(implementation, **(static or SOFTPLUS))(smooth, fixed, weights)
    return {name: np.asarray(value) for name, value in found.items()}


def assert_same_gradients(inputs, *, length, implementation=FUSED, **static):
    found = gradients(implementation, inputs, **static)
    for name, values in gradients("xla", inputs, **static).items():
        assert_close(found[name], values, dtype=np.float32, length=length, name=name)


# Layout.

LAYOUTS = {
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "fortran": np.asfortranarray,
    "every second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: np.flip(np.flip(x).copy()),
    "inside": lambda x: np.pad(x, 3)[tuple(slice(3, -3) for _ in x.shape)],
    "unaligned": lambda x: np.frombuffer(
        b"x" + x.tobytes(), x.dtype, x.size, 1
    ).reshape(x.shape),
    "read-only": lambda x: np.broadcast_to(x, (1, *x.shape))[0],
}


@each
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_in_memory_does_not_matter(layout, implementation):
    plain = {
        name: np.asarray(value)
        for name, value in cast(scan_arguments((2,), 7, 5, 4), "float32").items()
    }
    odd: dict[str, Any] = {name: LAYOUTS[layout](x) for name, x in plain.items()}
    assert all(np.array_equal(odd[name], plain[name]) for name in plain)
    want = scan(implementation, plain)

    @jax.jit
    def run(odd):
        return selective_scan(**odd, implementation=implementation, **SOFTPLUS)

    # Without `jit` the arrays reach the kernel by another way.
    arrays = {name: jnp.asarray(value) for name, value in odd.items()}
    eager = selective_scan(**arrays, implementation=implementation, **SOFTPLUS)
    for results in (run(odd), eager):
        for got, expected in zip(results, want, strict=True):
            assert_close(got, expected, dtype=np.float32)


@each
def test_transposed_inside_jit(implementation):
    inputs = cast(scan_arguments((2,), 7, 5, 4), "float32")
    turned = {name: value.T for name, value in inputs.items()}

    @jax.jit
    def run(turned):
        straight: dict[str, Any] = {name: x.T for name, x in turned.items()}
        y, state = selective_scan(**straight, implementation=implementation, **SOFTPLUS)
        return y.T, state.T

    for got, want in zip(run(turned), scan(implementation, inputs), strict=True):
        assert_close(got.T, want, dtype=np.float32)


# Sizes.

SIZES = {
    "no batch": ((0,), 5, 3, 4),
    "no batch, two axes": ((2, 0), 5, 3, 4),
    "no channels": ((2,), 5, 0, 4),
    "no states": ((2,), 5, 3, 0),
    "no states, one token": ((2,), 1, 3, 0),
    "nothing": ((0,), 1, 0, 0),
}


# Other kernels leave nothing to the XLA form, which the default then is.
OF_NOTHING: Any = FUSED if FUSED == "cpu" else None


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_zero(size):
    for options in ((), ("D", "z", "delta_bias", "initial_state", "reset")):
        inputs = cast(scan_arguments(*SIZES[size], options=options), "float32")
        want = oracles.selective_scan(**rounded(inputs), **SOFTPLUS)
        for implementation in ("xla", OF_NOTHING):
            got = scan(implementation, inputs)
            for one, other in zip(got, want, strict=True):
                assert_close(one, other, dtype=np.float32)
    assert_same_gradients(inputs, length=5, implementation=OF_NOTHING)


@pytest.mark.parametrize("shape", [((90,), 1, 3, 4), ((3,), 1, 170, 5)], ids=str)
def test_many_rows_or_channels_of_one_token(shape):
    for options in (("D", "z"), ("delta_bias", "initial_state", "reset")):
        inputs = cast(scan_arguments(*shape, options=options), "float32")
        want = oracles.selective_scan(**rounded(inputs), **SOFTPLUS)
        for got, expected in zip(scan(FUSED, inputs), want, strict=True):
            assert_close(got, expected, dtype=np.float32, length=5)
    assert_same_gradients(inputs, length=170)


# Numbers that are none.


def assert_alike(got, want):
    """Not finite in the same places, and close in all others."""
    for one, other in zip(got, want, strict=True):
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(one), finite)
        assert_close(one[finite], other[finite], dtype=np.float32, length=20)


@each
@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize(
    "name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]
)
def test_what_is_not_finite_goes_where_the_formula_says(name, seq, implementation):
    arguments = scan_arguments((2,), seq, 35, 4)
    arguments["reset"][:] = False
    for value in (np.nan, np.inf, -np.inf):
        spoiled = arguments[name].copy()
        spoiled[tuple(size // 2 for size in spoiled.shape)] = value
        inputs = cast(arguments | {name: spoiled}, "float32")
        for static in (SOFTPLUS, PLAIN):
            want = scan("reference", inputs, **static)
            assert_alike(scan(implementation, inputs, **static), want)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_leaves_the_gradients_of_other_rows_alone(value):
    inputs = cast(scan_arguments((3,), 9, 35, 4), "float32")
    clean = gradients(FUSED, inputs)
    for name in OF_ROWS:
        spoiled = inputs | {name: inputs[name].at[1].set(value)}
        found = gradients(FUSED, spoiled)
        for other in OF_ROWS:
            np.testing.assert_array_equal(found[other][::2], clean[other][::2])
        assert not np.all(np.isfinite(found["A"]))


# In the same lane of a register as channel 0, of any size of register, or in the next.
NEIGHBOURS = (1, 2, 4, 8, 12, 16, 32, 48)


@each
@pytest.mark.parametrize("name", ["delta", "A"])
def test_a_nan_hides_no_exponent_that_leaves_its_range(name, implementation):
    """One decision for many channels has to see the largest exponent of them all."""
    arguments = scan_arguments((1,), 9, 60, 3, options=("initial_state",))
    large = {"delta": (0, slice(2), 0), "A": (0, 0)}
    arguments[name][large[name]] *= 1e6
    inputs = cast(arguments, "float32")
    want = scan("reference", inputs, **PLAIN)
    want_state = want[1].swapaxes(1, 2)
    for channel in NEIGHBOURS:
        nan = {"delta": (0, 4, channel), "A": (channel, 1)}
        spoiled = inputs | {name: inputs[name].at[nan[name]].set(jnp.nan)}
        y, state = scan(implementation, spoiled, **PLAIN)
        others = np.arange(60) != channel
        assert np.all(np.isnan(y[:, 4:, channel]))
        for got, expected in ((y, want[0]), (state.swapaxes(1, 2), want_state)):
            # The others without channel 0 too, whose numbers are much larger.
            for kept in (others, others & (np.arange(60) > 0)):
                assert_close(
                    got[..., kept], expected[..., kept], dtype=np.float32, length=12
                )


@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize("name", ["u", "delta", "A", "z", "initial_state"])
def test_any_nan_stays_nan(name, seq):
    """Also one with the lowest bits set, as a damaged file may hold it."""
    arguments = scan_arguments((2,), seq, 20, 4)
    arguments["reset"][:] = False
    inputs = cast(arguments, "float32")
    values = np.array(inputs[name])
    at = tuple(size // 2 for size in values.shape)
    values[at] = np.array(0x7FC00155, np.uint32).view(np.float32)
    spoiled = inputs | {name: values}
    assert_alike(scan(FUSED, spoiled), scan("reference", spoiled))


# Step sizes of zero.


@each
@pytest.mark.parametrize("seq", [1, 9])
def test_steps_of_zero_change_nothing(seq, implementation):
    arguments = scan_arguments((2,), seq, 5, 4, options=("D", "z", "initial_state"))
    arguments["delta"] = np.zeros_like(arguments["delta"])
    inputs = cast(arguments, "float32")
    y, state = scan(implementation, inputs, **PLAIN)
    known = rounded(inputs)
    np.testing.assert_array_equal(state, known["initial_state"])
    inner = np.einsum("bsn,bdn->bsd", known["C"], known["initial_state"])
    inner = inner + known["D"] * known["u"]
    assert_close(y, inner * oracles.silu(known["z"]), dtype=np.float32, length=5)


def test_steps_of_zero_have_a_gradient():
    arguments = scan_arguments((2,), 9, 5, 4, options=("D", "z", "initial_state"))
    arguments["delta"] = np.zeros_like(arguments["delta"])
    inputs = cast(arguments, "float32")
    found = gradients(FUSED, inputs, **PLAIN)
    assert np.all(found["delta"] != 0)
    assert not np.any(found["A"])
    assert not np.any(found["B"])
    assert_same_gradients(inputs, length=18, **PLAIN)


# Sums over very many tokens.


@pytest.mark.skipif(FUSED != "cpu", reason="how C++ cuts a sum")
def test_a_sum_over_many_tokens_keeps_its_digits():
    tokens, channels, chunk = 2**16, 8, 64
    rng = np.random.default_rng(3)
    u, dy = rng.uniform(0.5, 1.5, (2, tokens, channels)).astype(np.float32)
    arguments = scan_arguments((), tokens, channels, 1, options=("D",))
    inputs: dict[str, Any] = cast(arguments, "float32") | {"u": jnp.asarray(u)}

    def loss(D):
        y, _ = selective_scan(**(inputs | {"D": D}), implementation="cpu")
        return jnp.sum(y * dy)

    got = jax.jit(jax.grad(loss))(inputs["D"])
    want = np.sum(u.astype(np.float64) * dy, axis=0)
    # Terms of one chunk, and chunks; one sum of all terms is twice as far off.
    length = chunk + tokens // chunk
    assert_close(got, want, dtype=np.float32, length=length, factor=1.0)


# The same again.

DETERMINISM = """
sys.path.insert(0, "tests")
from kernels.test_selective_scan_inputs import digest
print(digest())
"""


def digest() -> str:
    """Of results and gradients that many threads may work at."""
    arguments = scan_arguments((3,), 70, 260, 8)
    inputs = cast(arguments, "float32")
    found = gradients(FUSED, inputs)
    arrays = [*scan(FUSED, inputs), *(found[name] for name in sorted(found))]
    bits = hashlib.sha256()
    for array in arrays:
        bits.update(array.tobytes())
    return bits.hexdigest()


@pytest.mark.slow
def test_the_same_to_the_bit_again_and_on_any_number_of_threads():
    first = digest()
    assert all(digest() == first for _ in range(5))
    for threads in ("1", "3"):
        done = run_python(DETERMINISM, env={"NPROC": threads})
        assert done.stdout.splitlines()[-1] == first, done.stdout
