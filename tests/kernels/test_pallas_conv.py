"""The Pallas kernels of the depthwise convolution: interpreted, and lowered.

They compute in float32 only, so their derivatives are compared with those of the
reference in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import numpy_oracles as oracles
from support.kernel_cases import cast, conv_arguments, rounded, smooth_loss, split_fixed
from support.pallas import PLATFORMS, each_lowered, each_run
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.internal import accumulate
from capibara_eqx.kernels import causal_conv
from capibara_eqx.kernels._causal_conv import pallas_tpu, reference
from capibara_eqx.kernels._causal_conv._operands import Operands
from capibara_eqx.kernels._causal_conv._pallas_tpu_launch import Cut, cut_for
from capibara_eqx.kernels._causal_conv.specs import BENCHMARK_SPECS, TEST_SPECS


DEPTHWISE = [
    spec
    for spec in (*TEST_SPECS, *BENCHMARK_SPECS)
    if spec.groups == spec.c_in == spec.c_out
]


def slow(*values):
    """An interpreted kernel takes long to compile: a few small ones stand for all."""
    return pytest.param(*values, marks=pytest.mark.slow)


def loss_of(implementation, fixed, **static):
    def loss(smooth):
        known = {name: jnp.asarray(values) for name, values in fixed.items()}
        results = causal_conv(
            **smooth, **known, **static, implementation=implementation
        )
        wide = [accumulate(x) for x in results]
        return smooth_loss(jnp, wide)

    return loss


def in_float64(function, smooth):
    """A jitted function of the reference, of smooth arguments in float64."""
    with enable_x64(True):
        results = jax.jit(function)(cast(rounded(smooth), "float64"))
        return jax.tree.map(np.asarray, results)


def check(arguments, implementation, **static):
    """Values against the oracle, gradients against the reference."""
    smooth, fixed = split_fixed(arguments)
    inputs = cast(smooth, "float32")
    y, _ = jax.jit(
        functools.partial(causal_conv, **static, implementation=implementation)
    )(**inputs, **{name: jnp.asarray(v) for name, v in fixed.items()})
    want, _ = oracles.causal_conv(**rounded(inputs), **fixed, **static)
    width = arguments["weight"].shape[-1]
    assert_close(y, want, dtype="float32", length=width + 4, name="y")
    got = jax.jit(jax.grad(loss_of(implementation, fixed, **static)))(inputs)
    exact = in_float64(jax.grad(loss_of("reference", fixed, **static)), inputs)
    length = np.prod(arguments["x"].shape[:-1]) * width
    for name, values in exact.items():
        assert_close(got[name], values, dtype="float32", length=length, name=name)


@each_run
@pytest.mark.parametrize(
    ("batch", "seq", "channels", "width", "dilation", "activation"),
    [
        (2, 17, 3, 4, 1, "silu"),
        slow(2, 33, 6, 4, 1, "silu"),
        slow(1, 7, 3, 3, 3, None),
        slow(2, 5, 3, 1, 1, "silu"),
        slow(1, 9, 2, 8, 1, "silu"),
        slow(2, 1, 3, 4, 2, "silu"),
        slow(1, 600, 3, 4, 1, "silu"),
    ],
)
def test_values_and_gradients(
    batch, seq, channels, width, dilation, activation, implementation
):
    static = {"groups": channels, "dilation": dilation}
    arguments = conv_arguments((batch,), seq, channels, channels, width, **static)
    check(arguments, implementation, **static, activation=activation)


@pytest.mark.slow
@each_run
@pytest.mark.parametrize("option", [None, "bias", "initial_state", "segment_ids"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_each_option_alone(option, activation, implementation):
    options = () if option is None else (option,)
    arguments = conv_arguments((2,), 19, 3, 3, 4, groups=3, options=options)
    check(arguments, implementation, groups=3, activation=activation)


def operands_of(rows, groups, seq, channels, width, dilation):
    """Rows with documents, of which the first one has a history."""
    rng = np.random.default_rng(0)
    reach = (width - 1) * dilation
    starts = rng.random((rows, seq)) < 0.1
    # The history is of the first token's document.
    starts[:, 0] = False
    document = np.cumsum(np.pad(starts, ((0, 0), (reach, 0))), axis=1)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return Operands(
        normal(rows, seq, channels),
        normal(groups, channels, width),
        normal(groups, channels),
        normal(rows, reach, channels),
        jnp.asarray(document, jnp.int32),
    )


def row_of(operands, row):
    """The arguments of one row, in float64, and its documents."""
    x, weight, bias, history, document = map(np.asarray, operands)
    group = row // (x.shape[0] // weight.shape[0])
    smooth = (x[row], weight[group][:, None], bias[group], history[row])
    return *map(oracles.wide, smooth), document[row]


@pytest.mark.parametrize(
    ("rows", "groups", "seq", "channels", "width", "dilation", "cut"),
    [
        (2, 2, 40, 3, 4, 1, Cut(16, 3)),
        # Taps that reach over more than one chunk.
        slow(2, 1, 70, 3, 3, 11, Cut(16, 3)),
        slow(4, 2, 48, 130, 2, 16, Cut(16, 128)),
        # As channels are worked on by pieces of 256.
        slow(1, 1, 33, 300, 4, 3, Cut(32, 300)),
    ],
)
def test_tpu_chunks_pass_on_what_their_neighbours_need(
    rows, groups, seq, channels, width, dilation, cut
):
    operands = operands_of(rows, groups, seq, channels, width, dilation)
    dy = np.cos(np.arange(rows * seq * channels)).reshape(rows, seq, channels)

    @jax.jit
    def run(operands, dy):
        options = {"interpret": True, "cut": cut}
        y = pallas_tpu.forward(operands, dilation, True, **options)
        return y, pallas_tpu.backward(operands, dy, dilation, True, **options)

    y, found = run(operands, jnp.asarray(dy, jnp.float32))

    def pull(*arguments, dy):
        *smooth, document = arguments

        def run(x, weight, bias, history):
            where = (dilation, channels, history, document, "silu")
            return reference.causal_conv(x, weight, bias, *where)

        return jax.vjp(run, *smooth)[1](dy)

    # Sums for the weights are over a row, and all others over taps.
    length = seq * width
    for row in range(rows):
        x, weight, bias, history, document = row_of(operands, row)
        want, _ = oracles.causal_conv(
            x,
            weight,
            bias,
            activation="silu",
            dilation=dilation,
            groups=channels,
            initial_state=history,
            segment_ids=document[history.shape[0] :],
        )
        assert_close(y[row], want, dtype="float32", length=width + 4, name="y")
        with enable_x64(True):
            exact = jax.jit(pull)(x, weight, bias, history, document, dy=dy[row])
            exact = [np.asarray(values) for values in exact]
        exact[1] = exact[1][:, 0]
        for name, got, values in zip(Operands._fields, found[:4], exact, strict=False):
            assert_close(got[row], values, dtype="float32", length=length, name=name)


@each_run
def test_bfloat16_is_computed_in_float32_and_rounded_once(implementation):
    inputs = cast(conv_arguments((2,), 19, 3, 3, 4, groups=3), "bfloat16")
    static = {"groups": 3, "activation": "silu"}
    y, _ = jax.jit(
        functools.partial(causal_conv, **static, implementation=implementation)
    )(**inputs)
    want, _ = oracles.causal_conv(**rounded(inputs), **static)
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, want, length=8, name="y")


@pytest.mark.slow
@each_run
def test_gradients_in_bfloat16_are_rounded_once(implementation):
    smooth, fixed = split_fixed(conv_arguments((1,), 19, 3, 3, 4, groups=3))
    smooth = cast(smooth, "bfloat16")
    segment_ids = jnp.asarray(fixed["segment_ids"])
    # A cotangent without an error of its own.
    dy = jnp.cos(jnp.arange(57.0)).reshape(1, 19, 3).astype(jnp.bfloat16)

    def pull(implementation, smooth):
        def run(smooth):
            return causal_conv(
                **smooth,
                **{"groups": 3, "activation": "silu", "segment_ids": segment_ids},
                implementation=implementation,
            )[0]

        y, pull = jax.vjp(run, smooth)
        return pull(dy.astype(y.dtype))[0]

    got = jax.jit(functools.partial(pull, implementation))(smooth)
    want = in_float64(functools.partial(pull, "reference"), smooth)
    for name, values in want.items():
        assert got[name].dtype == jnp.bfloat16
        assert_rounded(got[name], values, length=19 * 4, name=name)


@pytest.mark.slow
@each_run
@pytest.mark.parametrize("shared", [True, False])
def test_vmap_over_weights(shared, implementation):
    static = {"groups": 3, "activation": "silu"}
    several = [
        conv_arguments((2,), 9, 3, 3, 4, groups=3, seed=seed) for seed in range(3)
    ]
    weights = ("weight", "bias")
    if shared:
        for arguments in several:
            arguments.update({n: v for n, v in several[0].items() if n not in weights})
    for arguments in several:
        arguments["segment_ids"] = several[0]["segment_ids"]
    parts = [split_fixed(arguments) for arguments in several]
    fixed, inputs = parts[0][1], [cast(smooth, "float32") for smooth, _ in parts]
    axes = {name: 0 if not shared or name in weights else None for name in inputs[0]}
    stacked = {
        name: inputs[0][name] if axis is None else jnp.stack([x[name] for x in inputs])
        for name, axis in axes.items()
    }
    gradient = jax.value_and_grad(loss_of(implementation, fixed, **static))
    value, got = jax.jit(jax.vmap(gradient, in_axes=(axes,)))(stacked)
    exact = jax.value_and_grad(loss_of("reference", fixed, **static))
    for index, known in enumerate(inputs):
        want, gradients = in_float64(exact, known)
        assert_close(value[index], want, dtype="float32", length=54, terms=9.0)
        for name, values in gradients.items():
            one = got[name][index]
            assert_close(one, values, dtype="float32", length=72, name=name)


@each_lowered
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(
            spec,
            dtype,
            id=f"{spec.name}-{dtype}",
            marks=[]
            if (spec, dtype) == (DEPTHWISE[0], "bfloat16")
            else pytest.mark.slow,
        )
        for spec in DEPTHWISE
        for dtype in ("float32", "bfloat16")
    ],
)
def test_a_gradient_lowers(spec, dtype, implementation):
    reach = (spec.width - 1) * spec.dilation
    shapes = {
        "x": (spec.batch, spec.seq, spec.c_in),
        "weight": (spec.c_out, 1, spec.width),
        "bias": (spec.c_out,),
        "initial_state": (spec.batch, reach, spec.c_in),
    }
    types = {name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()}
    ids = jax.ShapeDtypeStruct((spec.batch, spec.seq), "int32")
    static = {"groups": spec.groups, "dilation": spec.dilation, "activation": "silu"}

    def gradient(smooth, segment_ids):
        fixed = {} if segment_ids is None else {"segment_ids": segment_ids}
        return jax.value_and_grad(loss_of(implementation, fixed, **static))(smooth)

    platform = PLATFORMS[implementation]
    name = {"cuda": "mosaic", "tpu": "tpu_custom_call"}[platform]
    for documents in (None, ids):
        exported = export.export(jax.jit(gradient), platforms=[platform])(
            types, documents
        )
        assert exported.mlir_module().count(name) >= 2


def test_padding_of_a_tpu_block_adds_nothing_even_of_what_is_infinite():
    # Nine tokens: a chunk is padded, and its padding sees the last of them.
    arguments = conv_arguments((1,), 9, 3, 3, 4, groups=3, options=())
    arguments["x"][0, 8, 1] = np.inf
    inputs = cast(arguments, "float32")

    def gradient(implementation, inputs):
        def total(weight):
            y, _ = causal_conv(
                inputs["x"], weight, groups=3, implementation=implementation
            )
            return jnp.sum(jnp.where(jnp.isfinite(y), y, 0.0))

        return jax.grad(total)(inputs["weight"])

    got = jax.jit(functools.partial(gradient, "pallas_tpu"))(inputs)
    # Of the last token alone, whose own output is infinite, there is no cotangent.
    want = jax.jit(functools.partial(gradient, "reference"))(inputs)
    infinite = ~np.isfinite(want)
    np.testing.assert_array_equal(~np.isfinite(got), infinite)
    assert np.sum(infinite) == 1
    assert_close(
        np.where(infinite, 0, got), np.where(infinite, 0, want), dtype="float32"
    )


def test_a_tpu_has_no_numbers_of_64_bits_when_jax_has():
    arguments = conv_arguments((2,), 9, 3, 3, 4, groups=3, options=("segment_ids",))
    inputs = cast(arguments, "float32")
    segment_ids = inputs.pop("segment_ids")

    def total(inputs):
        y, _ = causal_conv(
            **inputs, groups=3, segment_ids=segment_ids, implementation="pallas_tpu"
        )
        return jnp.sum(y)

    with enable_x64(True):
        lowered = export.export(jax.jit(jax.grad(total)), platforms=["tpu"])(inputs)
    assert lowered.mlir_module().count("tpu_custom_call") >= 1


@each_run
def test_what_a_kernel_cannot_serve_is_refused_with_the_reason(implementation):
    def run(width, dtype="float32", dilation=1):
        x, weight = jnp.ones((2, 3), dtype), jnp.ones((3, 1, width), dtype)
        return causal_conv(
            x, weight, groups=3, dilation=dilation, implementation=implementation
        )

    with (
        enable_x64(True),
        pytest.raises(NotImplementedError, match="must be float32 or bfloat16"),
    ):
        run(4, "float64")
    with pytest.raises(NotImplementedError, match="width"):
        run(33)
    if implementation == "pallas_tpu":
        with pytest.raises(NotImplementedError, match="20000 tokens back"):
            run(2, dilation=20000)


def test_a_long_reach_gives_up_channels_and_then_tokens_of_a_tpu_block():
    assert cut_for(2048, 1536, 4, 1) == Cut(512, 512)
    assert cut_for(1, 1536, 4, 1) == Cut(16, 1536)
    assert cut_for(600, 1536, 4, 1) == Cut(304, 768)
    # Blocks of equal size: 600 tokens are not cut into 512 and 88.
    spans, tiles = zip(
        *(cut_for(2048, 1536, 2, reach) for reach in (1, 1000, 3000)), strict=True
    )
    assert list(spans) == sorted(spans, reverse=True)
    assert list(tiles) == sorted(tiles, reverse=True)
    assert tiles[0] > tiles[-1]
