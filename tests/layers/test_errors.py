"""Bad arguments of layers: the message names the argument and says what to do."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused
from support.quick import filled

from capibara_eqx.layers import (
    S4,
    S4D,
    S5,
    Conv1DBlock,
    DeltaNet,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    LinearSSM,
    Mamba,
    Mamba2,
    MetaLinearAttention,
    RMSNorm,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
NUMBERS: dict[str, Any] = {"seed": 0, "size": 1.0}


def builder(layer: Any, **defaults: Any) -> Any:
    """A function that builds the layer, with some arguments changed."""
    return lambda **options: layer(**(defaults | {"key": KEY} | options))


mamba = builder(Mamba, d_model=4, d_state=3)
s4 = builder(S4, d_model=4, d_state=2)
s4d = builder(S4D, d_model=4, d_state=2)
conv = builder(Conv1DBlock, in_channels=4, out_channels=4, kernel_size=3)
linear_ssm = builder(
    LinearSSM, input_dim=4, output_dim=4, state_dim=3, dropout_rate=0.0
)
s5 = builder(S5, d_model=4, d_state=6)
linear = builder(Linear, in_features=4, out_features=3)
embedding = builder(Embedding, num_embeddings=5, embedding_size=3)


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


MIXERS = {
    "Mamba": mamba,
    "Conv1DBlock": conv,
    "S4": s4,
    "S4D": s4d,
    "LinearSSM": linear_ssm,
    "Mamba2": builder(Mamba2, d_model=4, d_state=3, head_dim=4),
    "S5": s5,
    "DeltaNet": functools.cache(lambda: filled(DeltaNet, 4, 2, **NUMBERS)),
    "MetaLinearAttention": functools.cache(
        lambda: filled(MetaLinearAttention, 4, 2, **NUMBERS)
    ),
}
each = pytest.mark.parametrize("layer", MIXERS)

# constructor, argument, wrong values
SIZES = [
    (mamba, "d_model", [0, -4, 4.5, "8"]),
    (mamba, "d_state", [0, -1, True]),
    (mamba, "d_conv", [0, -1]),
    (mamba, "expand", [0, -2, 1.5]),
    (mamba, "dt_rank", [0, -1, None, 2.5]),
    (mamba, "dt_min", [0.0, -0.1, float("nan")]),
    (mamba, "dt_max", [-0.1, float("nan"), float("inf")]),
    (mamba, "dt_scale", [0.0, -1.0]),
    (mamba, "dt_init_floor", [-1.0, float("nan"), float("inf")]),
    (conv, "in_channels", [0, -4, 4.0]),
    (conv, "out_channels", [0, -4]),
    (conv, "kernel_size", [0, -3]),
    (conv, "groups", [0, -1]),
    (conv, "dilation", [0, -1]),
    (linear_ssm, "input_dim", [0, 2.5]),
    (linear_ssm, "output_dim", [0, -4]),
    (linear_ssm, "state_dim", [0, "4"]),
    (linear_ssm, "conv_dim", [0, -1]),
    (linear_ssm, "dt_min", [0.0, float("nan")]),
    (linear_ssm, "dt_max", [-0.1, float("inf")]),
    (s5, "d_model", [0, 1.5]),
    (s5, "d_state", [0, -2]),
    (s5, "blocks", [0, "2"]),
    (s5, "dt_min", [0.0, float("nan")]),
    (s5, "dt_max", [-0.1, float("inf")]),
    (linear, "in_features", [0, -1]),
    (linear, "out_features", [0, -1]),
    (embedding, "num_embeddings", [0, -1]),
    (embedding, "embedding_size", [0, -1]),
    (lambda d_model: RMSNorm(d_model), "d_model", [0, -1]),
    (lambda d_model: LayerNorm(d_model), "d_model", [0, -1]),
]


@pytest.mark.parametrize(
    ("build", "argument", "value"),
    [(build, name, value) for build, name, values in SIZES for value in values],
)
def test_sizes_that_are_not_positive(build, argument, value):
    with refused(f"`{argument}`", str(value)):
        build(**{argument: value})


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_eps_that_is_not_positive(norm):
    with refused("eps", "positive"):
        norm(4, eps=0.0)


# constructor, arguments, what the message says
CHOICES = [
    (mamba, {"dt_min": 0.2, "dt_max": 0.1}, ["dt_min", "dt_max", "swapped"]),
    (mamba, {"activation": "sillu"}, ["activation", "'sillu'", "Did you mean 'silu'"]),
    (conv, {"activation": "gelo"}, ["activation", "'gelo'", "Did you mean 'gelu'"]),
    (conv, {"activation": "tanh"}, ["activation", "'silu'", "'gelu'", "'relu'"]),
    (mamba, {"dt_init": "constnat"}, ["dt_init", "Did you mean 'constant'"]),
    (mamba, {"dt_rank": "automatic"}, ["dt_rank", "'automatic'", "'auto'"]),
    (conv, {"norm": "rmsnorm"}, ["norm", "'rms'", "'layer'"]),
    (conv, {"groups": 3}, ["groups", "divide", "in_channels", "3"]),
    (conv, {"out_channels": 6, "groups": 4}, ["groups", "out_channels", "6"]),
    (conv, {"out_channels": 6, "residual": True}, ["residual", "in_channels", "equal"]),
    (mamba, {"implementation": "xlaa"}, ["implementation", "'xlaa'", "xla"]),
    (mamba, {"conv_implementation": "xlaa"}, ["causal_conv", "'xlaa'", "xla"]),
    (mamba, {"conv_implementation": "associative"}, ["causal_conv", "'associative'"]),
    (conv, {"implementation": "xlaa"}, ["implementation", "'xlaa'", "xla"]),
    (mamba, {"implementation": ["xla", "cpu"]}, ["implementation", "one name"]),
    (linear_ssm, {"dt_min": 0.2, "dt_max": 0.1}, ["dt_min", "dt_max", "swapped"]),
    (linear_ssm, {"measure": "lags"}, ["measure", "'lags'", "Did you mean 'legs'"]),
    (linear_ssm, {"discretization": "zho"}, ["discretization", "Did you mean 'zoh'"]),
    (linear_ssm, {"implementation": "xlaa"}, ["implementation", "'xlaa'", "xla"]),
    (linear_ssm, {"dropout_rate": 1.5}, ["`dropout_rate`", "1.5", "between 0 and 1"]),
    (s5, {"dt_min": 0.2, "dt_max": 0.1}, ["dt_min", "dt_max", "swapped"]),
    (s5, {"d_state": 5}, ["`d_state`", "even", "d_state=5", "multiple of 2"]),
    (s5, {"blocks": 2}, ["`d_state`", "d_state=6 and blocks=2", "multiple of 4"]),
    (s5, {"discretization": "euler"}, ["discretization", "'zoh', 'bilinear'"]),
    (s5, {"C_init": "lecun_norm"}, ["C_init", "Did you mean 'lecun_normal'"]),
    (s5, {"implementation": "xlaa"}, ["implementation", "'xlaa'", "xla"]),
    (s5, {"dropout_rate": -0.5}, ["`dropout_rate`", "-0.5", "between 0 and 1"]),
    (Dropout, {"p": 1.5}, ["`p`", "1.5", "between 0 and 1"]),
    (Dropout, {"p": -0.1}, ["`p`", "-0.1", "between 0 and 1"]),
]


@pytest.mark.parametrize(("build", "arguments", "words"), CHOICES)
def test_arguments_that_do_not_fit(build, arguments, words):
    with refused(*words):
        build(**arguments)


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (linear(), 4),
        (RMSNorm(4), 4),
        (LayerNorm(4), 4),
        (mamba(), 4),
        (conv(), 4),
    ],
    ids=["Linear", "RMSNorm", "LayerNorm", "Mamba", "Conv1DBlock"],
)
@pytest.mark.parametrize("wrong", [5, 1])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_wrong_last_axis(layer, width, wrong, jitted):
    call = eqx.filter_jit(lambda layer, x: layer(x)) if jitted else type(layer).__call__
    fix = "width of its input"
    with refused(type(layer).__name__, "`x`", str(width), f"(7, {wrong})", fix):
        call(layer, zeros(7, wrong))


@pytest.mark.parametrize("layer", [linear(), RMSNorm(4)], ids=["Linear", "RMSNorm"])
def test_a_scalar_is_no_vector(layer):
    with refused("`x`", "4", "()"):
        layer(zeros())


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_ids_that_are_no_integers(dtype):
    with refused("Embedding", "`tokens`", "integers", dtype, "astype"):
        embedding()(zeros(2, dtype=dtype))


def test_scores_of_a_wrong_width():
    with refused("Embedding.attend", "`x`", "3", "(2, 4)"):
        embedding().attend(zeros(2, 4))


@each
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_a_sequence_of_length_zero(layer, shape):
    built = MIXERS[layer]()
    words = (layer, "`x`", "zero-length", str(shape), "at least one")
    with refused(*words):
        built(zeros(*shape))
    with refused(*words):
        built.prefill(zeros(*shape), built.init_cache(shape[:-2]))


@each
def test_one_token_is_no_sequence(layer):
    with refused(layer, "`x`", "(4,)", "step"):
        MIXERS[layer]()(zeros(4))


@each
def test_a_wrong_width_in_a_step(layer):
    built = MIXERS[layer]()
    with refused(f"{layer}.step", "`x`", "(2, 5)"):
        built.step(zeros(2, 5), built.init_cache((2,)))


@each
@pytest.mark.parametrize("shape", [(2, 6), (7,), (3, 7), (2, 7, 1), ()])
def test_segment_ids_of_another_shape(layer, shape):
    built, ids = MIXERS[layer](), zeros(*shape, dtype="int32")
    words = (layer, "`segment_ids`", "(2, 7)", str(shape), "batch and sequence")
    with refused(*words):
        built(zeros(2, 7, 4), segment_ids=ids)
    with refused(*words):
        built.prefill(zeros(2, 7, 4), built.init_cache((2,)), segment_ids=ids)


@each
@pytest.mark.parametrize("batch", [(), (3,), (1,), (2, 1)])
def test_a_cache_of_other_batch_axes(layer, batch):
    built = MIXERS[layer]()
    words = (layer, "`cache", "init_cache", "batch")
    with refused(*words):
        built.prefill(zeros(2, 7, 4), built.init_cache(batch))
    with refused(*words):
        built.step(zeros(2, 4), built.init_cache(batch))


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (mamba(), mamba(d_state=5)),
        (mamba(), mamba(d_conv=2)),
        (mamba(), mamba(expand=3)),
        (conv(), conv(kernel_size=5)),
        (conv(), conv(dilation=2)),
        (conv(), conv(in_channels=8)),
        (linear_ssm(), linear_ssm(state_dim=5)),
        (linear_ssm(), linear_ssm(conv_dim=2)),
        (s5(), s5(d_state=8)),
        (s5(), linear_ssm()),
        (s4d(), s4d(d_state=4)),
        (mamba(), conv()),
        (s4d(), mamba()),
        (s4(), s4(d_model=3)),
        (conv(), mamba()),
    ],
)
def test_a_cache_of_another_layer(layer, other):
    name = type(layer).__name__
    with refused(name, "`cache", "init_cache"):
        layer.prefill(zeros(2, 7, 4), other.init_cache((2,)))
    with refused(name, "`cache", "init_cache"):
        layer.step(zeros(2, 4), other.init_cache((2,)))


@each
def test_tokens_in_the_place_of_vectors(layer):
    with refused(layer, "`x`", "floating point", "int32", "embedding"):
        MIXERS[layer]()(zeros(7, 4, dtype="int32"))


@each
def test_something_that_is_no_cache(layer):
    built = MIXERS[layer]()
    for cache in (None, (), zeros(2, 3)):
        with refused(layer, "`cache`", "init_cache"):
            built.step(zeros(2, 4), cache)


def test_a_cache_with_a_part_missing():
    built = mamba()
    cache = eqx.tree_at(lambda c: c.conv, built.init_cache(), None)
    with refused("Mamba", "cache", "init_cache"):
        built.step(zeros(4), cache)


def test_a_centred_convolution_neither_streams_nor_packs():
    block = conv(causal=False)
    cache = conv().init_cache()
    words = ("Conv1DBlock", "causal=True", "streamed")
    with refused("`init_cache`", *words):
        block.init_cache()
    with refused("`prefill`", *words):
        block.prefill(zeros(7, 4), cache)
    with refused("`step`", *words):
        block.step(zeros(4), cache)
    with refused("Conv1DBlock", "`segment_ids`", "causal=True", "packed"):
        block(zeros(7, 4), segment_ids=zeros(7, dtype="int32"))
    with refused("Conv1DBlock", "`x`", "zero-length"):
        block(zeros(0, 4))
    with refused("Conv1DBlock", "`x`", "(7, 5)"):
        block(zeros(7, 5))


def test_dropout_without_a_key():
    with refused("Dropout", "`key`", "inference_mode"):
        Dropout(0.5)(zeros(3))


@pytest.mark.parametrize("build", [linear_ssm, s5], ids=["LinearSSM", "S5"])
def test_a_state_space_that_drops_needs_a_key(build):
    with refused("Dropout", "`key`", "inference_mode"):
        build(dropout_rate=0.1)(zeros(5, 4))


def test_forward_that_drops_needs_a_key():
    layer = linear_ssm(dropout_rate=0.1)
    with refused("Dropout", "`key`", "inference_mode"):
        layer.forward(zeros(2, 5, 4))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 5, 4), (2, 0, 4), (0, 4)])
def test_axes_that_forward_does_not_take(shape):
    with refused("LinearSSM.forward", "`x`", "one token a row", str(shape)):
        linear_ssm().forward(zeros(*shape))


def test_a_state_that_forward_does_not_take():
    layer, words = linear_ssm(), ("LinearSSM.forward", "`state`", "(2, 3)")
    for shape in [(3,), (2, 4), (1, 3), (2, 5, 3)]:
        with refused(*words, str(shape)):
            layer.forward(zeros(2, 5, 4), zeros(*shape))
    with refused(*words, "str"):
        layer.forward(zeros(2, 4), "zeros")
    with refused("LinearSSM", "`cache", "init_cache", "batch"):
        layer.forward(zeros(2, 5, 4), layer.init_cache((3,)))
    with refused("LinearSSM.forward", "`x`", "(2, 5)"):
        layer.forward(zeros(2, 5))
