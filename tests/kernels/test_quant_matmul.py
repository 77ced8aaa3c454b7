"""Products with packed codes, and their derivatives, against a NumPy loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import packed_oracle as oracle
from support.derivatives import (
    check_first_order,
    check_second_order,
    check_third_order,
    check_vmap_of_derivatives,
    quick_jit,
)
from support.packed_cases import (
    arguments,
    compiled,
    expected,
    narrow,
    run,
    static,
    terms,
)
from support.precision import enable_x64
from support.tolerances import EPSILONS, assert_close, assert_rounded

from capibara_eqx.kernels import decode_codes, quant_matmul, round_tokens
from capibara_eqx.kernels._quant_matmul import Packing
from capibara_eqx.kernels._quant_matmul.specs import TEST_SPECS, Spec


IMPLEMENTATIONS = ("xla", "reference")
BY_NAME = {spec.name: spec for spec in TEST_SPECS}
GROUPED = BY_NAME["int4_groups_zero_int8"]

each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_spec = pytest.mark.parametrize("spec", TEST_SPECS, ids=lambda spec: spec.name)


@each
@each_spec
def test_values(spec, implementation):
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)
    y = compiled(spec, implementation)(smooth, fixed)
    assert y.dtype == jnp.float32
    want, size = expected(spec, smooth, fixed), terms(spec, smooth)
    assert_close(y, want, dtype="float32", length=spec.in_features, terms=size)


@each
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.slow
def test_every_number_of_bits(bits, activations, implementation):
    spec = Spec("bits", 2, 11, 3, bits, 4, zero=True, activations=activations)
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)
    y = compiled(spec, implementation)(smooth, fixed)
    want, size = expected(spec, smooth, fixed), terms(spec, smooth)
    assert_close(y, want, dtype="float32", length=11, terms=size)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("group_size", [1, 3, 10, 64])
def test_groups_of_every_size(group_size, activations):
    spec = Spec("groups", 2, 10, 3, 4, group_size, True, activations)
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)
    y = compiled(spec)(smooth, fixed)
    want, size = expected(spec, smooth, fixed), terms(spec, smooth)
    assert_close(y, want, dtype="float32", length=10, terms=size)


@each
@pytest.mark.parametrize("name", ["int4_groups", "int4_groups_zero_int8", "ternary"])
def test_one_row_of_scales_serves_all_rows(name, implementation):
    spec = BY_NAME[name]
    smooth, fixed = arguments(spec, rows=1)
    smooth = narrow(smooth)
    y = compiled(spec, implementation)(smooth, fixed)
    want, size = expected(spec, smooth, fixed), terms(spec, smooth)
    assert_close(y, want, dtype="float32", length=spec.in_features, terms=size)


@each
@each_spec
@pytest.mark.slow
def test_float64_stays_float64(spec, implementation):
    smooth, fixed = arguments(spec)
    with enable_x64(True):
        y = compiled(spec, implementation)(narrow(smooth, "float64"), fixed)
    assert y.dtype == np.float64
    want, size = expected(spec, smooth, fixed), terms(spec, smooth)
    assert_close(y, want, dtype="float64", length=spec.in_features, terms=size)


@each
@pytest.mark.parametrize("name", ["ternary", "int4_groups_zero_int8"])
@pytest.mark.slow
def test_bfloat16_is_computed_in_float32_and_rounded_once(name, implementation):
    spec = BY_NAME[name]._replace(in_features=300, group_size=None)
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth, "bfloat16")
    y = compiled(spec, implementation)(smooth, fixed)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, expected(spec, smooth, fixed), length=300)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("name", ["int4_groups", "int8_zero_int8"])
def test_any_number_of_batch_axes(name, batch):
    spec = BY_NAME[name]
    smooth, fixed = arguments(spec, batch)
    smooth = narrow(smooth)
    y = compiled(spec)(smooth, fixed)
    assert y.shape == (*batch, spec.out_features)
    if 0 not in batch:
        want = expected(spec, smooth, fixed)
        assert_close(y, want, dtype="float32", length=spec.in_features, terms=2.0)


@each
def test_without_jit(implementation):
    smooth, fixed = arguments(GROUPED)
    smooth = narrow(smooth)
    y = run(GROUPED, implementation, smooth, fixed)
    want = expected(GROUPED, smooth, fixed)
    assert_close(y, want, dtype="float32", length=10, terms=2.0)


# Whole numbers.


@pytest.mark.parametrize(("bits", "size"), [(2, 2000), (8, 513), (8, 1), (3, 70)])
@pytest.mark.parametrize("has_zero", [False, True])
def test_sums_of_whole_numbers_are_exact(bits, size, has_zero):
    spec = Spec("whole", 3, size, 4, bits, None, has_zero, "int8")
    smooth, fixed = arguments(spec, seed=bits)
    smooth = narrow(smooth)
    y = np.asarray(compiled(spec, "xla")(smooth, fixed), np.float64)
    middle = fixed.get("zero", np.full((4, 1), 2 ** (bits - 1)))
    codes = np.stack([oracle.unpack(row, bits, size) for row in fixed["codes"]])
    steps = codes - middle.astype(np.int64)
    scale = np.asarray(smooth["scale"], np.float64)[:, 0]
    for token, x in enumerate(np.asarray(smooth["x"])):
        whole, step = oracle.token_codes(x)
        sums = steps @ whole
        assert sums.dtype == np.int64
        # A few roundings of the result itself: nothing is left of a sum's.
        allowed = 6 * EPSILONS["float32"] * np.abs(sums * scale * step)
        assert np.all(np.abs(y[token] - sums * scale * step) <= allowed)


def test_the_largest_sums_fit():
    # As wide as is allowed, of codes as far from their zero point as can be.
    size = 2**31 // (127 * 255)
    x = jnp.ones((1, size))
    codes = jnp.full((1, size), 255, jnp.uint8)
    zero, scale = jnp.zeros((1, 1), jnp.uint8), jnp.ones((1, 1))
    y = jax.jit(functools.partial(quant_matmul, bits=8, activations="int8"))(
        x, codes, scale, zero
    )
    np.testing.assert_allclose(y, [[255.0 * size]], rtol=4 * EPSILONS["float32"])


def test_tokens_without_a_step():
    spec = BY_NAME["ternary_int8"]
    smooth, fixed = arguments(spec)
    x = np.zeros((5, 13), np.float32)
    # The largest value is subnormal, so that the step is zero.
    x[1] = 2.0**-149
    for implementation in IMPLEMENTATIONS:
        y = compiled(spec, implementation)(narrow(smooth) | {"x": x}, fixed)
        assert np.all(np.isfinite(y))
        np.testing.assert_array_equal(y[0], np.zeros(7))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-60, 60))
def test_tokens_are_rounded_to_127_steps(seed, exponent):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.standard_normal((3, 5)) * 2.0**exponent)
    rounded = np.asarray(_rounded(x), np.float64)
    step = np.max(np.abs(x), axis=-1, keepdims=True).astype(np.float64) / 127
    steps = rounded / step
    near = EPSILONS["float32"] * 127 * 4
    np.testing.assert_allclose(steps, np.rint(steps), atol=near)
    assert np.all(np.abs(steps) <= 127 + near)
    assert np.all(np.abs(rounded - x) <= step * (0.5 + near))
    np.testing.assert_array_equal(_rounded(-x), -rounded)
    # Scaling by a power of two is exact.
    np.testing.assert_array_equal(_rounded(4 * x), 4 * rounded)


_rounded = jax.jit(round_tokens)


def test_rounded_tokens_against_the_loop():
    x = narrow(arguments(GROUPED, (4, 3))[0])["x"]
    got = _rounded(x)
    assert_close(got, oracle.round_tokens(np.asarray(x)), dtype="float32")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("has_zero", [False, True])
def test_the_matrix_that_codes_stand_for(bits, has_zero):
    spec = Spec("matrix", 1, 13, 3, bits, 5, has_zero)
    smooth, fixed = arguments(spec)
    packing = Packing(bits, 13, 5)
    assert (packing.groups, packing.middle) == (3, 2 ** (bits - 1))
    scale = np.float32(smooth["scale"])
    zero = fixed.get("zero")
    decode = functools.partial(decode_codes, packing=packing)
    got = quick_jit(decode)(fixed["codes"], scale, zero)
    want = oracle.matrix(fixed["codes"], scale, zero, bits=bits, size=13, group_size=5)
    np.testing.assert_array_equal(got, np.float32(want))


# Derivatives.


def loss_pair(spec, implementation=None):
    """A scalar of the product in JAX, the same in NumPy, and a point.

    Derivatives pass the rounding of tokens as if it were not there. So in NumPy what
    rounding has added at the point is a constant, and at it all derivatives agree; what
    is clipped is a constant altogether.
    """
    point, fixed = arguments(spec)
    # Of the size of one, as finite differences want it.
    unit = 2.0**-spec.bits
    point["scale"] /= unit
    added, through = np.zeros_like(point["x"]), np.ones_like(point["x"])
    if spec.activations == "int8":
        added = oracle.round_tokens(point["x"]) - point["x"]
    if spec.activations == "static_int8":
        step = fixed["input_scale"]
        rounded, through = oracle.round_by_one_step(point["x"], step)
        assert not through.all()
        added = rounded - through * point["x"]
    options = static(spec) | {"activations": None}

    def function(arrays):
        smooth = arrays | {"scale": unit * arrays["scale"]}
        y = run(spec, implementation, smooth, fixed)
        return jnp.sum(jnp.sin(y) + y)

    def value(arrays):
        x, scale = through * arrays["x"] + added, unit * arrays["scale"]
        y = oracle.quant_matmul(x, scale=scale, **fixed, **options)
        return float(np.sum(np.sin(y) + y))

    return function, value, point


@each_spec
def test_first_derivatives(spec):
    check_first_order(*loss_pair(spec))


@pytest.mark.slow
@each_spec
def test_first_derivatives_of_the_reference(spec):
    check_first_order(*loss_pair(spec, "reference"))


SECOND = ["int3_zero", "int4_groups_zero_int8", "ternary_static"]


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(
            spec, marks=[] if spec.name in SECOND else pytest.mark.slow, id=name
        )
        for name, spec in BY_NAME.items()
    ],
)
def test_second_derivatives(spec):
    check_second_order(*loss_pair(spec))


@pytest.mark.parametrize("spec", [GROUPED, BY_NAME["int4_groups_zero_static"]], ids=str)
def test_third_derivatives(spec):
    check_third_order(*loss_pair(spec))


@pytest.mark.parametrize("name", ["int3_zero", "int4_groups_int8"])
def test_vmap_of_derivatives(name):
    # What rounding adds is that of one point, so the other has the same tokens.
    function, value, point = loss_pair(BY_NAME[name])
    other = {"x": point["x"], "scale": 1.3 * point["scale"]}
    check_vmap_of_derivatives(function, value, [point, other])


# Transformations.


@each
@pytest.mark.parametrize("own", ["tokens", "scales", "matrices", "everything"])
def test_vmap(own, implementation):
    names = {
        "tokens": {"x"},
        "scales": {"scale"},
        "matrices": {"codes", "scale", "zero"},
        "everything": {"x", "codes", "scale", "zero"},
    }[own]
    rows = [several(seed) for seed in range(3)]
    stacked = {
        name: jnp.stack([row[name] for row in rows]) if name in names else values
        for name, values in rows[0].items()
    }
    axes = ({name: 0 if name in names else None for name in stacked},)
    one = functools.partial(product, implementation)
    got = quick_jit(jax.vmap(one, in_axes=axes))(stacked)
    for index, row in enumerate(rows):
        mixed = {name: (row if name in names else rows[0])[name] for name in row}
        want = oracle.quant_matmul(**as_numpy(mixed), **static(GROUPED))
        assert_close(got[index], want, dtype="float32", length=10, terms=2.0)


def several(seed):
    """All arguments of a grouped product by name."""
    smooth, fixed = arguments(GROUPED, seed=seed)
    return narrow(smooth) | {n: jnp.asarray(v) for n, v in fixed.items()}


def product(implementation, known):
    return quant_matmul(**known, **static(GROUPED), implementation=implementation)


def as_numpy(known):
    return {name: np.asarray(values) for name, values in known.items()}


@each
@pytest.mark.parametrize("activations", [None, "int8"])
def test_scan_over_layers(activations, implementation):
    spec = Spec("square", 2, 6, 6, 4, 4, zero=True, activations=activations)
    layers = [arguments(spec, seed=seed) for seed in range(3)]
    x = narrow(layers[0][0])["x"]
    parts = [{"scale": narrow(smooth)["scale"], **fixed} for smooth, fixed in layers]
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def layer(x, part):
        part = {name: part[name] for name in ("codes", "scale", "zero")}
        options = static(spec) | {"implementation": implementation}
        return jnp.tanh(quant_matmul(x, **part, **options)), None

    got, _ = quick_jit(lambda x, parts: jax.lax.scan(layer, x, parts))(x, stacked)
    want = np.asarray(x, np.float64)
    for part in parts:
        part = {name: np.asarray(values) for name, values in part.items()}
        want = np.tanh(oracle.quant_matmul(want, **part, **static(spec)))
    assert_close(got, want, dtype="float32", length=18, terms=2.0)


@pytest.mark.parametrize("name", ["int4_groups", "int4_groups_zero_int8"])
def test_checkpoint(name):
    spec = BY_NAME[name]
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)

    def loss(smooth):
        inner = jax.checkpoint(lambda smooth: run(spec, None, smooth, fixed))
        return jnp.sum(jnp.sin(inner(smooth)))

    gradient = quick_jit(jax.grad(loss))(smooth)
    dy = np.cos(expected(spec, smooth, fixed))
    known = {n: np.asarray(v, np.float64) for n, v in smooth.items()}
    dx, dscale = closed_form(spec, known, fixed, dy)
    size = spec.in_features
    assert_close(gradient["x"], dx, dtype="float32", length=size, terms=1.0)
    assert_close(gradient["scale"], dscale, dtype="float32", length=size, terms=8.0)


def closed_form(spec, smooth, fixed, dy):
    """The cotangents of tokens and of scales for that of the product."""
    options = {n: static(spec)[n] for n in ("bits", "group_size")}
    options["size"] = size = spec.in_features
    codes, zero = fixed["codes"], fixed.get("zero")
    x = smooth["x"]
    if spec.activations == "int8":
        x = oracle.round_tokens(x)
    dx = dy @ oracle.matrix(codes, smooth["scale"], zero, **options)
    steps = oracle.matrix(codes, np.ones_like(smooth["scale"]), zero, **options)
    of_elements = (dy.T @ x) * steps
    dscale = np.zeros_like(smooth["scale"])
    for i in range(size):
        dscale[:, i // spec.group_size] += of_elements[:, i]
    return dx, dscale
