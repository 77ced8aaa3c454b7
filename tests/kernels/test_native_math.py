"""The exponential and what is made of it in C++, against long double in NumPy.

Errors are counted in units of the last place. A rounding costs at most one (half of
one, of a number that may be up to twice the result). The polynomial of 2^f is off by
9e-8 for float, 1.5 units at worst, and by next to nothing for double; the
multiply-add that ends it rounds once. `sigmoid` and `softplus` add their own roundings:
of the reduced argument, of a sum, a quotient and a last sum or product.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from capibara_eqx.kernels._native._compiler import find_compiler


SOURCE = Path(__file__).with_name("native") / "math.cc"
COUNT = 200_001  # No multiple of any register.

C_NAMES = {np.float32: "float", np.float64: "double"}
EXP2_UNITS = {np.float32: 2.5, np.float64: 1.1}
UNITS = {"exp2_of_any": 0.0, "sigmoid": 3.0, "softplus": 4.0}
# The smallest exponent of a normal number.
SMALLEST = {np.float32: -126.0, np.float64: -1022.0}

wide = np.longdouble
each_dtype = pytest.mark.parametrize("dtype", C_NAMES, ids=C_NAMES.get)


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, wide(1)) / (1 + e)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


REFERENCES = {"exp2_of_any": np.exp2, "sigmoid": sigmoid, "softplus": softplus}
each_function = pytest.mark.parametrize("name", REFERENCES)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = find_compiler()
    assert compiler is not None, "these tests need a C++ compiler"
    path = tmp_path_factory.mktemp("native") / "math.so"
    compiler.compile(SOURCE, path)
    return ctypes.CDLL(str(path))


def call(library, name, *arrays):
    # One number of room behind the result, which must stay as it was.
    out = np.full(arrays[0].size + 1, -7.0, arrays[0].dtype)
    arrays = [np.ascontiguousarray(array) for array in arrays]
    function = getattr(library, f"{name}_{C_NAMES[out.dtype.type]}")
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, out)]
    function(ctypes.c_int64(arrays[0].size), *pointers)
    assert out[-1] == -7.0
    return out[:-1]


def assert_within(units, got, want, x):
    """Both are compared where `want` is normal, with room for what comes before."""
    tiny = np.finfo(got.dtype).tiny
    normal = want >= 2 * tiny
    spacing = np.spacing(want.astype(got.dtype)).astype(wide)
    errors = np.where(normal, np.abs(got - want) / spacing, 0)
    worst = np.argmax(errors)
    assert errors[worst] <= units, (
        f"{float(errors[worst]):.2f} units of the last place at {x[worst]!r}: "
        f"{got[worst]!r}, expected {float(want[worst])!r}"
    )
    # Numbers below the normal ones may be zero.
    assert np.all(np.abs(got - want)[~normal] <= tiny)


@each_function
@each_dtype
def test_over_the_whole_range(library, name, dtype):
    rng = np.random.default_rng(0)
    # Up to where the result, or one minus it, leaves the normal numbers.
    end = -SMALLEST[dtype] * (1 if name == "exp2_of_any" else np.log(2))
    units = EXP2_UNITS[dtype] + UNITS[name]
    for low, high in ((-end, end), (-1, 1), (-20, 20), (-1.1 * end, -0.98 * end)):
        x = rng.uniform(low, high, COUNT).astype(dtype)
        want = REFERENCES[name](x.astype(wide))
        assert_within(units, call(library, name, x), want, x)


@each_dtype
def test_power_of_a_product_enters_unrounded(library, dtype):
    rng = np.random.default_rng(1)
    for largest in (1e-3, 1.0, 20.0, -SMALLEST[dtype] - 0.01):
        # Sizes over many decades, with the largest product at the end of the range.
        scale = np.exp(rng.uniform(-8, 8, COUNT))
        signs = rng.uniform(-1, 1, (2, COUNT))
        a = (signs[0] * scale).astype(dtype)
        b = (signs[1] * largest / scale).astype(dtype)
        want = np.exp2(a.astype(wide) * b.astype(wide))
        got = call(library, "exp2_of_bounded", a, b)
        assert_within(EXP2_UNITS[dtype], got, want, a)


@each_dtype
def test_extremes(library, dtype):
    info = np.finfo(dtype)
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, info.max, -info.max], dtype)
    for name, expected in {
        "exp2_of_any": [np.nan, np.nan, np.inf, 0, np.inf, 0],
        "sigmoid": [np.nan, np.nan, 1, 0, 1, 0],
        "softplus": [np.nan, np.nan, np.inf, 0, info.max, 0],
    }.items():
        np.testing.assert_array_equal(call(library, name, x), expected, err_msg=name)


@each_dtype
def test_next_to_zero(library, dtype):
    info = np.finfo(dtype)
    x = np.array([0.0, info.smallest_subnormal, info.tiny, info.eps**2], dtype)
    x = np.concatenate([x, -x])
    assert np.all(call(library, "exp2_of_any", x) == 1)
    assert np.all(call(library, "exp2_of_bounded", x, x) == 1)
    assert np.all(call(library, "sigmoid", x) == 0.5)
    want = np.full(x.shape, np.log(wide(2)))
    units = EXP2_UNITS[dtype] + UNITS["softplus"]
    assert_within(units, call(library, "softplus", x), want, x)


@each_dtype
def test_ends_of_the_exponents(library, dtype):
    smallest, largest = SMALLEST[dtype], 2 - SMALLEST[dtype]
    below = np.nextafter(dtype(largest), dtype(0))
    halves = np.array([largest - 0.5, largest - 0.25, below], dtype)
    want = np.exp2(halves.astype(wide))
    got = call(library, "exp2_of_any", halves)
    assert_within(EXP2_UNITS[dtype], got, want, halves)
    x = np.array([largest, largest + 1, smallest, smallest - 0.5], dtype)
    expected = np.array([np.inf, np.inf, 2.0**smallest, 0.0])
    np.testing.assert_array_equal(call(library, "exp2_of_any", x), expected)
    whole = np.arange(smallest, largest, dtype=dtype)
    # Not `np.exp2`, which in float32 is an ulp off at 2^127 on some processors.
    powers = np.ldexp(dtype(1), whole.astype(int))
    np.testing.assert_array_equal(call(library, "exp2_of_any", whole), powers)


@each_function
@each_dtype
def test_nan_of_any_payload_stays_nan(library, name, dtype):
    bits = np.dtype(f"u{dtype().itemsize}")
    payloads = np.arange(1, 5000, dtype=bits)
    quiet = np.array(np.nan, dtype).view(bits)
    sign = bits.type(1 << (8 * bits.itemsize - 1))
    for kind in (quiet, quiet | sign):
        got = call(library, name, (payloads | kind).view(dtype))
        assert np.all(np.isnan(got)), got[~np.isnan(got)][:5]


@each_function
@each_dtype
def test_every_lane_is_computed_alone(library, name, dtype):
    x = np.linspace(-9, 9, 37).astype(dtype)
    alone = call(library, name, x)
    for at in range(x.size):
        spoiled = x.copy()
        spoiled[at] = np.nan
        got = call(library, name, spoiled)
        np.testing.assert_array_equal(np.delete(got, at), np.delete(alone, at))
        assert np.isnan(got[at])


@each_dtype
def test_sizes_that_fill_no_register(library, dtype):
    x = np.linspace(-3, 3, 70).astype(dtype)
    whole = call(library, "softplus", x)
    for size in range(x.size):
        got = call(library, "softplus", x[:size])
        np.testing.assert_array_equal(got, whole[:size])
