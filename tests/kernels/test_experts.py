"""The experts against a loop over tokens, their derivatives, and what is dropped."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from support import expert_oracle
from support.derivatives import (
    check_first_order,
    check_second_order,
    check_third_order,
    check_vmap_of_derivatives,
    quick_jit,
)
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.kernels import experts
from capibara_eqx.kernels._experts import _grouped_blocks, _grouped_ragged
from capibara_eqx.kernels._experts.specs import TEST_SPECS, Spec


# By name, with the capacity at which it drops nothing, if it has one.
DROPLESS = ("ragged", "dense", "scan", "gather", "reference")
IMPLEMENTATIONS = (*DROPLESS, "capacity")
BIASES = ("gate_bias", "up_bias", "down_bias")

each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
seeds = st.integers(0, 2**32 - 1)


def arguments(spec: Spec, biases=True, seed=0):
    """Float64 arrays by name, and the choices, some of which are none."""
    rng = np.random.default_rng(seed)
    _, tokens, d_model, count, d_ff, top_k = spec
    shapes = {
        "x": (tokens, d_model),
        "weights": (tokens, top_k),
        "gate": (count, d_ff, d_model),
        "up": (count, d_ff, d_model),
        "down": (count, d_model, d_ff),
    }
    if biases:
        shapes |= {"gate_bias": (count, d_ff), "up_bias": (count, d_ff)}
        shapes |= {"down_bias": (count, d_model)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    # Some experts are chosen more often than others.
    scores = rng.standard_normal((tokens, count)) + np.linspace(0, 2, count)
    indices = np.argsort(-scores, axis=-1)[:, :top_k].astype("int32")
    if tokens > 2:
        indices[1, 0], indices[2] = count, -1
    return arrays, indices


def run(arrays, indices, implementation, activation="silu", factor=None):
    if implementation == "capacity" and factor is None:
        factor = float(arrays["gate"].shape[0])
    return experts(
        **arrays,
        indices=jnp.asarray(indices),
        activation=activation,
        capacity_factor=factor,
        implementation=implementation,
    )


def narrow(arrays, dtype="float32"):
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def compiled(implementation, **options):
    return quick_jit(functools.partial(run, implementation=implementation, **options))


def once_without(values):
    """All with biases; without them the one in the middle, the rest only if slow."""
    middle = values[len(values) // 2]
    rest = [value for value in values if value is not middle]
    return [
        *[(value, True) for value in values],
        (middle, False),
        *[pytest.param(value, False, marks=pytest.mark.slow) for value in rest],
    ]


def name_of(value):
    return value.name if isinstance(value, Spec) else str(value)


@each
@pytest.mark.parametrize(("spec", "biases"), once_without(TEST_SPECS), ids=name_of)
def test_values(spec, biases, implementation):
    activation = {"odd": "gelu", "one_expert": "relu"}.get(spec.name, "silu")
    arrays, indices = arguments(spec, biases)
    single = narrow(arrays)
    want, _ = expert_oracle.experts(single, indices, activation)
    got, dropped = compiled(implementation, activation=activation)(single, indices)
    assert_close(got, want, dtype=np.float32, length=spec.top_k * spec.d_ff)
    assert dropped == 0


@pytest.mark.parametrize(("factor", "biases"), once_without([0.3, 0.8, 1.2]))
def test_what_finds_no_place_is_dropped(factor, biases):
    spec = Spec("crowded", 23, 3, 4, 2, 2)
    arrays, indices = arguments(spec, biases)
    places = math.ceil(factor * spec.top_k * spec.tokens / spec.num_experts)
    single = narrow(arrays)
    want, want_dropped = expert_oracle.experts(single, indices, places=places)
    got, dropped = compiled("capacity", factor=factor)(single, indices)
    assert want_dropped > 0
    assert dropped == want_dropped
    assert_close(got, want, dtype=np.float32, length=4)


def test_a_capacity_alone_chooses_its_implementation():
    arrays, indices = arguments(TEST_SPECS[2])
    arrays = narrow(arrays)
    got = compiled(None, factor=0.5)(arrays, indices)
    want = compiled("capacity", factor=0.5)(arrays, indices)
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1] == want[1] > 0


@each
def test_sums_are_carried_wide(implementation):
    spec = Spec("long", 3, 300, 2, 40, 2)
    arrays, indices = arguments(spec)
    indices = np.asarray([[0, 1], [1, 0], [0, 1]], "int32")
    half = {
        name: jnp.asarray(np.abs(array), "bfloat16") for name, array in arrays.items()
    }
    got, _ = compiled(implementation)(half, indices)
    want, _ = expert_oracle.experts(half, indices)
    assert got.dtype == jnp.bfloat16
    # Rounded twice: between the products, and at the end.
    assert_close(got.astype("float32"), want, dtype="bfloat16", factor=1.0)


@each
def test_a_row_of_no_expert_may_hold_anything(implementation):
    arrays, indices = arguments(TEST_SPECS[2])
    arrays = narrow(arrays)
    clean, _ = compiled(implementation)(arrays, indices)
    np.testing.assert_array_equal(clean[2], np.zeros(5))
    if implementation == "ragged":
        dirty = arrays | {"x": arrays["x"].at[2].set(jnp.nan)}
        got, _ = compiled(implementation)(dirty, indices)
        np.testing.assert_array_equal(got, clean)


def loss_pair(spec, implementation):
    """A scalar of everything that can be differentiated, in JAX and in NumPy."""
    point, indices = arguments(spec)
    point = {name: 0.7 * array for name, array in point.items()}

    def function(arrays):
        y, _ = run(arrays, indices, implementation, "gelu")
        return jnp.sum(jnp.sin(y) + y)

    def oracle(arrays):
        y, _ = expert_oracle.experts(arrays, indices, "gelu")
        return float(np.sum(np.sin(y) + y))

    return function, oracle, point


SMALL = Spec("small", 5, 2, 3, 2, 2)


@each
def test_first_derivatives(implementation):
    check_first_order(*loss_pair(SMALL, implementation))


@each
def test_second_derivatives(implementation):
    check_second_order(*loss_pair(SMALL, implementation))


def test_third_derivatives():
    check_third_order(*loss_pair(SMALL, None))


def test_vmap_of_derivatives_with_weights_of_each_row():
    function, oracle, point = loss_pair(SMALL, None)
    rng = np.random.default_rng(1)
    other = {n: v + 0.3 * rng.standard_normal(v.shape) for n, v in point.items()}
    check_vmap_of_derivatives(function, oracle, [point, other])


@pytest.mark.parametrize("implementation", ["ragged", "scan", "gather", "capacity"])
@pytest.mark.parametrize("own", ["tokens", "indices", "experts", "everything"])
def test_vmap(own, implementation):
    points = [arguments(SMALL, seed=seed) for seed in range(3)]
    names = {
        "tokens": {"x", "weights", "indices"},
        "indices": {"indices"},
        "experts": set(points[0][0]) - {"x", "weights"},
        "everything": {*points[0][0], "indices"},
    }[own]
    rows = [{**narrow(arrays), "indices": indices} for arrays, indices in points]
    first = rows[0]
    stacked = {
        name: jnp.stack([row[name] for row in rows]) if name in names else first[name]
        for name in first
    }
    axes = ({name: 0 if name in names else None for name in first},)

    def one(arguments):
        arguments = dict(arguments)
        return run(arguments, arguments.pop("indices"), implementation)[0]

    got = quick_jit(jax.vmap(one, in_axes=axes))(stacked)
    for index, row in enumerate(rows):
        mixed = {name: (row if name in names else first)[name] for name in first}
        indices = np.asarray(mixed.pop("indices"))
        want, _ = expert_oracle.experts(mixed, indices)
        assert_close(got[index], want, dtype=np.float32, length=4)


def rematerialised(arrays, indices):
    def loss(arrays):
        inner = jax.checkpoint(lambda arrays: run(arrays, indices, "ragged")[0])
        return jnp.sum(jnp.sin(inner(arrays)))

    return jax.grad(loss)(arrays)


def test_checkpoint():
    arrays, indices = arguments(SMALL)
    arrays = narrow(arrays)
    dense = jax.grad(lambda a: jnp.sum(jnp.sin(run(a, indices, "dense")[0])))
    want = quick_jit(dense)(arrays)
    got = quick_jit(rematerialised)(arrays, indices)
    for name in arrays:
        assert_close(got[name], want[name], dtype=np.float32, length=20, name=name)


@settings(max_examples=50)
@given(seed=seeds)
def test_the_order_of_tokens_and_experts_does_not_matter(seed):
    spec = Spec("fixed", 11, 3, 4, 2, 2)
    arrays, indices = arguments(spec, seed=seed)
    rng = np.random.default_rng(seed)
    tokens, names = rng.permutation(11), rng.permutation(4)
    own = {"x", "weights"}
    moved = {
        name: array[tokens] if name in own else array[names]
        for name, array in arrays.items()
    }
    renamed = np.append(np.argsort(names), [4, -1])[indices[tokens]].astype("int32")
    function = _fixed()
    want, _ = function(narrow(arrays), indices)
    got, _ = function(narrow(moved), renamed)
    assert_close(got, want[tokens], dtype=np.float32, length=4)


@functools.cache
def _fixed():
    return compiled(None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "crowd"), [(1, 0.0), (200, 0.0), (200, 0.7), (9, 1.0)]
)
def test_grouped_products_of_every_platform(rows, crowd, dtype):
    """What runs on a GPU or a TPU, and what runs on a CPU, against a loop.

    A part of the rows crowds into one group, above what the others may have.
    """
    rng = np.random.default_rng(rows)
    groups, d_in, d_out = 5, 3, 4
    group = rng.integers(-1, groups + 1, rows)
    group = jnp.asarray(np.where(rng.random(rows) < crowd, 2, group), "int32")
    left = jnp.asarray(rng.standard_normal((rows, d_in)), dtype)
    right = jnp.asarray(rng.standard_normal((rows, d_out)), dtype)
    stacked = jnp.asarray(rng.standard_normal((groups, d_out, d_in)), dtype)
    wide = [np.asarray(x, np.float64) for x in (left, right, stacked)]
    product, back = np.zeros((rows, d_out)), np.zeros((rows, d_in))
    outer = np.zeros((groups, d_in, d_out))
    for row, own in enumerate(np.asarray(group)):
        if 0 <= own < groups:
            product[row] = wide[2][own] @ wide[0][row]
            back[row] = wide[2][own].T @ wide[1][row]
            outer[own] += np.outer(wide[0][row], wide[1][row])

    def everything(module):
        return (
            module.matmul(left, stacked, group, False),
            module.matmul(right, stacked, group, True),
            module.outer(left, right, group, groups),
        )

    for module in (_grouped_blocks, _grouped_ragged):
        results = quick_jit(functools.partial(everything, module))()
        for got, want in zip(results, (product, back, outer), strict=True):
            assert got.dtype == jnp.float32
            assert_close(got, want, dtype=np.float32, length=60)


@each
def test_no_token_at_all(implementation):
    arrays, indices = arguments(SMALL)
    none = narrow(arrays) | {"x": jnp.zeros((0, 2)), "weights": jnp.zeros((0, 2))}
    y, dropped = run(none, indices[:0], implementation)
    assert y.shape == (0, 2)
    assert dropped == 0


def test_float64_stays_float64():
    arrays, indices = arguments(TEST_SPECS[2])
    want, _ = expert_oracle.experts(arrays, indices)
    with enable_x64(True):
        for implementation in IMPLEMENTATIONS:
            got, _ = compiled(implementation)(narrow(arrays, "float64"), indices)
            assert_close(got, want, dtype=np.float64, length=9)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_can_be_lowered_for(platform):
    arrays, indices = arguments(SMALL)

    def gradient(arrays, indices):
        return jax.grad(lambda a: jnp.sum(run(a, indices, "ragged")[0] ** 2))(arrays)

    export.export(jax.jit(gradient), platforms=[platform])(narrow(arrays), indices)


def test_the_gradient_of_the_scan_keeps_one_expert_at_a_time():
    spec = Spec("many", 64, 32, 16, 32, 2)
    arrays, indices = arguments(spec)

    def gradient(arrays, indices, implementation):
        def loss(x):
            return jnp.sum(run(arrays | {"x": x}, indices, implementation)[0] ** 2)

        return jax.grad(loss)(arrays["x"])

    sizes = {}
    for name in ("scan", "dense"):
        function = jax.jit(functools.partial(gradient, implementation=name))
        analysis = function.lower(narrow(arrays), indices).compile().memory_analysis()
        assert analysis is not None
        sizes[name] = analysis.temp_size_in_bytes
    assert sizes["dense"] > 16 * 64 * 32 * 4
    assert sizes["scan"] < sizes["dense"] / 3
