"""The Pallas kernels of the packed product: interpreted, and lowered."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
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
from support.pallas import PLATFORMS, each_lowered, each_run
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import _backends, quant_matmul
from capibara_eqx.kernels._quant_matmul import Packing
from capibara_eqx.kernels._quant_matmul._planes import Chunk, chunk_for
from capibara_eqx.kernels._quant_matmul.pallas_tpu import _spans
from capibara_eqx.kernels._quant_matmul.specs import BENCHMARK_SPECS, TEST_SPECS, Spec


pytestmark = pytest.mark.slow


# Bits that fill bytes.
SERVED = [spec for spec in TEST_SPECS if 8 % spec.bits == 0]
BY_NAME = {spec.name: spec for spec in SERVED}

# Several blocks of everything, and the last ones cut off: of tokens, rows, bytes.
LARGE = [
    Spec("rows", 3, 37, 300, 4),
    Spec("tokens", 270, 21, 5, 2, activations="int8"),
    Spec("bytes", 2, 1305, 6, 8, zero=True),
    Spec("bytes_int8", 2, 2601, 6, 2, zero=True, activations="int8"),
    # Groups of a few bytes, of some chunks, and of a chunk, of which the last is short.
    Spec("short_groups", 2, 1100, 6, 4, 64),
    Spec("short_groups_int8", 2, 1100, 6, 4, 64, True, "int8"),
    Spec("long_groups", 2, 5000, 3, 2, 2048, True),
    Spec("even_groups", 2, 700, 5, 8, 128, True, "int8"),
    # In the one chunk that there is groups may be of any number of bytes.
    Spec("odd_groups", 2, 50, 5, 4, 14, True, "int8"),
]


def check(spec, implementation, smooth, fixed):
    y = compiled(spec, implementation)(smooth, fixed)
    want = expected(spec, smooth, fixed)
    # Zero points are made up for by the sum of the token: terms twice as large.
    size = 2 * np.max(np.abs(smooth["x"])) * np.max(smooth["scale"]) * 2**spec.bits
    length = spec.in_features
    assert_close(y, want, dtype="float32", length=length, terms=float(size))


@each_run
@pytest.mark.parametrize("spec", SERVED, ids=lambda spec: spec.name)
def test_values(spec, implementation):
    smooth, fixed = arguments(spec)
    check(spec, implementation, narrow(smooth), fixed)


@each_run
@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.name)
@pytest.mark.slow
def test_blocks_put_together(spec, implementation):
    if (spec.name, implementation) == ("odd_groups", "pallas_gpu"):
        # Its rows are longer than a chunk, and no chunk is of whole groups.
        spec = spec._replace(in_features=36)
    check(spec, implementation, *rounded_already(spec))


@each_run
def test_one_row_of_scales_serves_all_rows(implementation):
    spec = LARGE[4]
    check(spec, implementation, *rounded_already(spec, rows=1))


@each_run
@pytest.mark.parametrize("name", ["ternary", "int8_zero_int8"])
def test_bfloat16_is_computed_in_float32_and_rounded_once(name, implementation):
    spec = BY_NAME[name]._replace(in_features=200)
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth, "bfloat16")
    y = compiled(spec, implementation)(smooth, fixed)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, expected(spec, smooth, fixed), length=400)


@each_run
def test_sums_of_whole_numbers_are_exact(implementation):
    spec = Spec("whole", 3, 1000, 4, 8, activations="int8")
    smooth, fixed = rounded_already(spec)
    # Steps of one, and scales of one: the sums themselves, below 2^24.
    smooth = {"x": 64 * smooth["x"], "scale": jnp.ones((4, 1))}
    y = compiled(spec, implementation)(smooth, fixed)
    codes = np.stack([oracle.unpack(row, 8, 1000) for row in fixed["codes"]]) - 128
    want = np.asarray(smooth["x"]).astype(np.int64) @ codes.T
    assert np.max(np.abs(want)) < 2**24
    # The step is 1 to its own rounding.
    np.testing.assert_allclose(y, want, rtol=2.0**-22, atol=0)


@each_run
def test_bits_behind_the_last_code_may_hold_anything(implementation):
    spec = BY_NAME["ternary"]
    smooth, fixed = arguments(spec)
    dirty = fixed["codes"].copy()
    dirty[:, -1] |= 0b11111100
    assert not np.array_equal(dirty, fixed["codes"])
    call = compiled(spec, implementation)
    got = call(narrow(smooth), {"codes": dirty})
    np.testing.assert_array_equal(got, call(narrow(smooth), fixed))


@each_run
@pytest.mark.slow
def test_gradients(implementation):
    spec = BY_NAME["int4_groups_int8"]
    smooth, fixed = arguments(spec)

    def gradient(name, smooth):
        def loss(smooth):
            return jnp.sum(jnp.sin(run(spec, name, smooth, fixed)))

        first = jax.grad(loss)
        along = jax.tree.map(jnp.ones_like, smooth)
        return first(smooth), jax.jvp(first, (smooth,), (along,))[1]

    got = jax.jit(functools.partial(gradient, implementation))(narrow(smooth))
    with enable_x64(True):
        exact = jax.jit(functools.partial(gradient, "reference"))
        want = jax.tree.map(np.asarray, exact(narrow(smooth, "float64")))
    for values, known in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(values, known, dtype="float32", length=33)


@each_run
@pytest.mark.parametrize("own", ["tokens", "matrices", "everything"])
def test_vmap(own, implementation):
    spec = BY_NAME["int4_groups_int8"]
    names = {
        "tokens": {"x"},
        "matrices": {"codes", "scale"},
        "everything": {"x", "codes", "scale"},
    }[own]
    rows = [arguments(spec, (), seed) for seed in range(3)]
    rows = [{**narrow(smooth), **fixed} for smooth, fixed in rows]
    stacked = {
        n: np.stack([row[n] for row in rows]) if n in names else v
        for n, v in rows[0].items()
    }
    options = static(spec) | {"implementation": implementation}
    one = lambda known: quant_matmul(**known, **options)
    axes = ({name: 0 if name in names else None for name in stacked},)
    call = jax.jit(jax.vmap(one, in_axes=axes))
    got = call({name: jnp.asarray(values) for name, values in stacked.items()})
    for index, row in enumerate(rows):
        known = {n: np.asarray((row if n in names else rows[0])[n]) for n in row}
        want = oracle.quant_matmul(**known, **static(spec))
        assert_close(got[index], want, dtype="float32", length=11, terms=1.0)


def test_a_batch_of_tokens_is_one_product_of_all():
    spec = BY_NAME["int4_groups_int8"]
    smooth, fixed = arguments(spec, (2, 3))
    one = functools.partial(run, spec, "pallas_tpu")
    for axis in (None, 0):
        axes = ({"x": 0, "scale": axis}, None)
        both = jax.vmap(
            jax.vmap(one, in_axes=axes), in_axes=({"x": 0, "scale": None}, None)
        )
        scale = smooth["scale"] if axis is None else np.stack([smooth["scale"]] * 3)
        text = str(
            jax.make_jaxpr(both)(narrow({"x": smooth["x"], "scale": scale}), fixed)
        )
        # Of a kernel, and of its interpreter.
        assert text.count("pallas_call[") == 2
        assert (f"f32[6,{spec.out_features}]" in text) == (axis is None)


# A newer jax compiles for Triton as it lowers, by what comes with its support of GPUs.
COMPILES = jax.__version_info__ > (0, 10, 2)
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
TRITON = "triton_kernel_call_ffi" if COMPILES else "__gpu$xla.gpu.triton"
CALLS = {"pallas_gpu": f"@{TRITON}", "pallas_tpu": "@tpu_custom_call"}
# What Triton is given has no promise of compatibility, and none is needed here.
UNCHECKED = export.DisabledSafetyCheck.custom_call(TRITON)


def skip_without_compiler(implementation):
    if implementation == "pallas_gpu" and COMPILES:
        if not any(map(importlib.util.find_spec, PLUGINS)):
            pytest.skip(f"needs one of {', '.join(PLUGINS)}")


def lowered(spec, implementation, dtype="float32", platform=None):
    """The program of a product for the kernel's platform, or another."""
    skip_without_compiler(implementation)
    groups = -(-spec.in_features // (spec.group_size or spec.in_features))
    smooth = {
        "x": jax.ShapeDtypeStruct((spec.tokens, spec.in_features), dtype),
        "scale": jax.ShapeDtypeStruct((spec.out_features, groups), dtype),
    }
    size = spec.in_features * spec.bits // 8
    fixed = {"codes": jax.ShapeDtypeStruct((spec.out_features, size), "uint8")}
    if spec.zero:
        fixed["zero"] = jax.ShapeDtypeStruct((spec.out_features, groups), "uint8")
    exported = export.export(
        jax.jit(functools.partial(run, spec, implementation)),
        platforms=[platform or PLATFORMS[implementation]],
        disabled_checks=[UNCHECKED],
    )(smooth, fixed)
    return exported.mlir_module()


@each_lowered
def test_by_default_it_is_the_kernel_of_the_platform(implementation, monkeypatch):
    skip_without_compiler(implementation)
    platform = PLATFORMS[implementation]
    monkeypatch.setattr(_backends, "platform", lambda: platform)
    spec = BENCHMARK_SPECS[0]
    assert lowered(spec, None, platform=platform).count(CALLS[implementation]) == 1
    # Lowered for another platform it is what runs there, and so is a refused case.
    assert "custom_call" not in lowered(spec, None, platform="cpu")
    refused = spec._replace(bits=3)
    assert "custom_call" not in lowered(refused, None, platform=platform)


@each_lowered
def test_a_kernel_does_not_run_on_another_platform(implementation):
    (other,) = {"cuda", "tpu"} - {PLATFORMS[implementation]}
    with pytest.raises(NotImplementedError, match=f"not run on {other}|{other}"):
        lowered(BENCHMARK_SPECS[0], implementation, platform=other)


@each_lowered
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", BENCHMARK_SPECS, ids=lambda spec: spec.name)
@pytest.mark.slow
def test_a_product_lowers_without_the_matrix(spec, dtype, implementation):
    text = lowered(spec, implementation, dtype)
    assert text.count(CALLS[implementation]) == 1
    # Codes of eight bits are a matrix of as many elements, but of no other type.
    for kind in ("f32", "bf16", "i32"):
        assert f"tensor<{spec.out_features}x{spec.in_features}x{kind}>" not in text


@each_lowered
@pytest.mark.parametrize("spec", [BY_NAME["int8_zero_int8"], *LARGE[4:8]], ids=str)
@pytest.mark.slow
def test_odd_sizes_lower(spec, implementation):
    assert lowered(spec, implementation).count(CALLS[implementation]) == 1


@each_lowered
def test_no_numbers_of_64_bits_when_jax_has_them(implementation):
    with enable_x64(True):
        text = lowered(LARGE[5], implementation)
    assert text.count(CALLS[implementation]) == 1


@each_lowered
def test_tokens_on_several_devices_lower_with_their_gradient(implementation):
    skip_without_compiler(implementation)
    spec = LARGE[5]._replace(tokens=8)
    smooth, fixed = arguments(spec)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"x": PartitionSpec("data"), "scale": PartitionSpec()}
    product = jax.shard_map(
        functools.partial(run, spec, implementation),
        mesh=mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    gradient = jax.grad(lambda smooth, fixed: jnp.sum(product(smooth, fixed) ** 2))
    exported = export.export(
        jax.jit(gradient),
        platforms=[PLATFORMS[implementation]],
        disabled_checks=[UNCHECKED],
    )(narrow(smooth), fixed)
    assert exported.mlir_module().count(CALLS[implementation]) == 1


@each_run
@pytest.mark.parametrize(
    ("spec", "dtype", "words"),
    [
        (Spec("bits", 2, 8, 3, 3), "float32", "codes of 3 bits are cut into parts"),
        (Spec("group", 2, 30, 3, 4, 5), "float32", "groups of 5 codes begin within"),
        (
            Spec("short", 2, 9000, 3, 2, 4),
            "float32",
            "groups of 4 codes of 2 bits neither fit into chunks",
        ),
        (Spec("empty", 2, 8, 0, 4), "float32", "nothing to multiply"),
        (Spec("wide", 2, 8, 3, 4), "float64", "`x` must be float32 or bfloat16"),
    ],
)
def test_what_a_kernel_cannot_serve_is_refused_with_the_reason(
    spec, dtype, words, implementation
):
    size = spec.group_size or spec.in_features
    groups = -(-spec.in_features // size)
    shape = (spec.out_features, spec.in_features * spec.bits // 8)
    with enable_x64(dtype == "float64"):
        smooth = {
            "x": jnp.ones((2, spec.in_features), dtype),
            "scale": jnp.ones((spec.out_features, groups), dtype),
        }
        fixed = {"codes": jnp.zeros(shape, jnp.uint8)}
        with pytest.raises(NotImplementedError, match=words):
            run(spec, implementation, smooth, fixed)
        y = compiled(spec, (implementation, "xla"))(smooth, fixed)
    assert y.shape == (2, spec.out_features)


def test_a_chunk_has_as_few_groups_as_can_be():
    def found(*packing):
        return chunk_for(Packing(*packing), _spans(Packing(*packing)))

    assert found(2, 2048) == Chunk(512, 1, 1)
    assert found(8, 2048) == Chunk(512, 1, 4)
    assert found(4, 2048, 128) == Chunk(128, 2, 1)
    assert found(8, 2048, 128) == Chunk(128, 1, 1)
    assert found(8, 8192, 1024) == Chunk(512, 1, 2)
    assert found(8, 8192, 768) == Chunk(384, 1, 2)
    # All of a row that is short.
    assert found(4, 50, 14) == Chunk(25, 4, 1)
    assert found(8, 8192, 100) is None
