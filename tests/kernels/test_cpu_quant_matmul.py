"""The packed product in C++, against the NumPy loop, at the edges of its blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from support import packed_oracle as oracle
from support.packed_cases import (
    arguments,
    compiled,
    expected,
    narrow,
    rounded_already,
    run,
    static,
)
from support.precision import enable_x64
from support.tolerances import EPSILONS, assert_close, assert_rounded

from capibara_eqx.kernels import implementations, quant_matmul
from capibara_eqx.kernels._quant_matmul import cpu
from capibara_eqx.kernels._quant_matmul.specs import TEST_SPECS, Spec


pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None or jax.default_backend() != "cpu",
    reason=str(cpu.unavailable()),
)

# Blocks are of 64 rows, 16 of them together, of 6 tokens and of 64 bytes.
EDGES = [
    Spec("one", 1, 1, 1, 8),
    Spec("below", 5, 255, 63, 2),
    Spec("full", 6, 256, 64, 2, zero=True),
    Spec("above", 7, 257, 65, 2),
    Spec("registers", 13, 33, 17, 4, zero=True),
    Spec("bytes", 12, 131, 130, 8, zero=True),
    Spec("groups", 8, 70, 20, 4, 8, zero=True),
    Spec("long_groups", 3, 700, 5, 2, 256, zero=True),
    Spec("one_short_group", 2, 10, 3, 4, 64),
]
EDGES = [spec._replace(activations="int8") for spec in EDGES]
SERVED = [s for s in TEST_SPECS if s.activations and s.group_size is None]


def check(spec, smooth, fixed):
    """Sums are exact, so a result has a rounding a group and a few of its own."""
    y = compiled(spec, "cpu")(smooth, fixed)
    want = expected(spec, smooth, fixed)
    x, scale = np.max(np.abs(smooth["x"])), np.max(smooth["scale"])
    terms = float(spec.in_features**0.5 * x * scale * 2**spec.bits)
    assert_close(y, want, dtype="float32", length=16, factor=1.0, terms=terms)


@pytest.mark.parametrize("spec", [*SERVED, *EDGES], ids=lambda spec: spec.name)
def test_values(spec):
    check(spec, *rounded_already(spec))


@pytest.mark.parametrize("tokens", range(1, 14))
@pytest.mark.slow
def test_every_number_of_tokens(tokens):
    spec = EDGES[4]._replace(tokens=tokens)
    check(spec, *rounded_already(spec))


@pytest.mark.slow
@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 4, 8]),
    tokens=st.integers(1, 8),
    size=st.integers(1, 300),
    rows=st.integers(1, 80),
    has_zero=st.booleans(),
)
def test_sums_of_whole_numbers_are_exact(seed, bits, tokens, size, rows, has_zero):
    spec = Spec("any", tokens, size, rows, bits, None, has_zero, "int8")
    _, fixed = arguments(spec, seed=seed)
    x = np.random.default_rng(seed).integers(-127, 128, (tokens, size))
    # So that a step is one, as is every scale: the results are the sums.
    x[:, 0] = 127
    smooth = {"x": jnp.asarray(x, "float32"), "scale": jnp.ones((rows, 1))}
    y = run(spec, "cpu", smooth, fixed)
    codes = np.stack([oracle.unpack(row, bits, size) for row in fixed["codes"]])
    zero = fixed.get("zero", np.full((rows, 1), 2 ** (bits - 1))).astype(np.int64)
    want = x.astype(np.int64) @ (codes - zero).T
    assert np.max(np.abs(want)) < 2**24
    # The step is one to its own rounding.
    np.testing.assert_allclose(y, want, rtol=2 * EPSILONS["float32"], atol=0)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    spec = EDGES[6]
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth, "bfloat16")
    y = compiled(spec, "cpu")(smooth, fixed)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, expected(spec, smooth, fixed), length=70)


def test_gradients():
    spec = EDGES[6]
    smooth, fixed = arguments(spec)

    def gradient(name, smooth):
        def loss(smooth):
            return jnp.sum(jnp.sin(run(spec, name, smooth, fixed)))

        first = jax.grad(loss)
        along = jax.tree.map(jnp.ones_like, smooth)
        return first(smooth), jax.jvp(first, (smooth,), (along,))[1]

    got = jax.jit(functools.partial(gradient, "cpu"))(narrow(smooth))
    with enable_x64(True):
        exact = jax.jit(functools.partial(gradient, "reference"))
        want = jax.tree.map(np.asarray, exact(narrow(smooth, "float64")))
    for values, known in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(values, known, dtype="float32", length=500)


@pytest.mark.parametrize("own", ["tokens", "matrices", "everything"])
def test_vmap(own):
    spec = EDGES[6]
    names = {
        "tokens": {"x"},
        "matrices": {"codes", "scale", "zero"},
        "everything": {"x", "codes", "scale", "zero"},
    }[own]
    rows = [arguments(spec, (), seed) for seed in range(3)]
    rows = [{**narrow(smooth), **fixed} for smooth, fixed in rows]
    stacked = {
        n: jnp.asarray(np.stack([row[n] for row in rows]) if n in names else v)
        for n, v in rows[0].items()
    }
    one = lambda known: quant_matmul(**known, **static(spec), implementation="cpu")
    axes = ({name: 0 if name in names else None for name in stacked},)
    got = jax.jit(jax.vmap(one, in_axes=axes))(stacked)
    for index, row in enumerate(rows):
        known = {n: np.asarray((row if n in names else rows[0])[n]) for n in row}
        want = oracle.quant_matmul(**known, **static(spec))
        assert_close(got[index], want, dtype="float32", length=70, terms=4.0)


def test_it_is_the_default_here_where_it_can():
    found = {
        x.name
        for x in implementations()
        if x.operation == "quant_matmul" and x.is_default
    }
    assert found == {"cpu"}
    for spec, has in ((EDGES[6], True), (EDGES[6]._replace(activations=None), False)):
        lowered = jax.jit(functools.partial(run, spec, None)).lower(
            narrow(arguments(spec)[0]), arguments(spec)[1]
        )
        assert ("capibara_quant_matmul" in lowered.as_text()) == has


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activations": None}, "whole numbers only, with `activations='int8'`"),
        ({"bits": 3}, "codes of 3 bits"),
        ({"group_size": 6}, "groups of 6 codes of 4 bits are not of 4 bytes"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(changes, words):
    spec = EDGES[6]._replace(**changes)
    smooth, fixed = arguments(spec)
    with pytest.raises(NotImplementedError, match=words):
        run(spec, "cpu", narrow(smooth), fixed)
    y = compiled(spec, ("cpu", "xla"))(narrow(smooth), fixed)
    assert y.shape == (spec.tokens, spec.out_features)


def test_tokens_on_several_devices_are_left_to_xla():
    spec = EDGES[6]
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)
    specs = ({"x": PartitionSpec("data"), "scale": PartitionSpec()}, PartitionSpec())

    def shared(implementation):
        return jax.shard_map(
            functools.partial(run, spec, implementation),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=specs,
            out_specs=PartitionSpec("data"),
        )

    y = jax.jit(shared(None))(smooth, fixed)
    want = expected(spec, smooth, fixed)
    assert_close(y, want, dtype="float32", length=70, terms=4.0)
    with pytest.raises(NotImplementedError, match=r"inside `jax\.shard_map`"):
        shared("cpu")(smooth, fixed)
