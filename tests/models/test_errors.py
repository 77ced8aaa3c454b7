"""Bad arguments of models: the message names the argument and says what to do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.layers import Conv1DBlock, Mamba
from capibara_eqx.models import (
    LanguageModel,
    ResidualBlock,
    Stack,
    generate,
    mamba_language_model,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
D = 3


def block(**options: Any) -> ResidualBlock:
    arguments: dict[str, Any] = {"d_state": 2} | options
    return ResidualBlock(Mamba(D, **arguments, key=KEY), D)


def conv_block() -> ResidualBlock:
    return ResidualBlock(Conv1DBlock(D, D, 2, key=KEY), D)


def model(n_layers: int = 2, **options: Any) -> LanguageModel:
    return mamba_language_model(7, D, n_layers, d_state=2, key=KEY, **options)


def ids(*shape):
    return jnp.zeros(shape, "int32")


SCANS = pytest.mark.parametrize("scan", [False, True], ids=["list", "scanned"])


@pytest.mark.parametrize("scan", [False, True])
def test_no_blocks(scan):
    with refused("`blocks`", "at least one"):
        Stack([], scan=scan)
    with refused("`blocks`", "at least one"):
        LanguageModel(7, D, [], scan=scan, key=KEY)


@pytest.mark.parametrize(
    "other",
    [
        conv_block(),
        block(d_state=3),
        block(bias=True),
        block(activation="gelu"),
        block(dtype=jnp.bfloat16),
        ResidualBlock(Mamba(D, 2, key=KEY), D, dropout=0.1),
        ResidualBlock(Mamba(D, 2, key=KEY), D, eps=1e-3),
    ],
    ids=["kind", "shape", "structure", "static", "dtype", "rate", "eps"],
)
def test_blocks_that_differ_are_not_scanned(other):
    Stack([block(), block(), other])
    with refused("`blocks`", "block 2", "alike", "scan=False"):
        Stack([block(), block(), other], scan=True)


def test_an_unknown_policy():
    with refused("`remat`", "'ful'", "'full'", "'dots'", "Did you mean 'full'"):
        Stack([block()], remat="ful")
    with refused("`remat`", "'all'"):
        LanguageModel(7, D, [block()], remat="all", key=KEY)


@pytest.mark.parametrize("value", [0, -1, 2.5])
@pytest.mark.parametrize("name", ["vocab_size", "d_model", "n_layers"])
def test_sizes_that_are_not_positive(name, value):
    sizes: dict[str, Any] = {"vocab_size": 7, "d_model": D, "n_layers": 1}
    with refused(f"`{name}`", str(value), "positive"):
        mamba_language_model(**(sizes | {name: value}), key=KEY)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_dropout_rate_that_is_no_probability(rate):
    with refused("`dropout`", str(rate), "between 0 and 1"):
        ResidualBlock(Mamba(D, 2, key=KEY), D, dropout=rate)


def test_a_block_of_another_width():
    wide = ResidualBlock(Mamba(5, 2, key=KEY), 5)
    with refused("`x`", "5", f"(4, {D})"):
        Stack([block(), wide])(jnp.zeros((4, D)))


@pytest.mark.parametrize("width", [1, 2])
def test_a_mixer_that_changes_the_width(width):
    narrow = ResidualBlock(Conv1DBlock(D, width, 2, key=KEY), D)
    with refused("ResidualBlock", "mixer", str(width), str(D)):
        narrow(jnp.zeros((4, D)))


@SCANS
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_tokens_that_are_no_sequence(scan, shape):
    built = model(scan=scan)
    words = ("`tokens`", str(shape), "step")
    with refused(*words):
        built(ids(*shape))
    with refused(*words):
        built.prefill(ids(*shape), built.init_cache(shape[:-1]))


def test_tokens_that_are_no_integers():
    built = model()
    words = ("`tokens`", "integers", "float32", "astype")
    with refused(*words):
        built(jnp.zeros((2, 4)))
    with refused(*words):
        built.prefill(jnp.zeros((2, 4)), built.init_cache((2,)))
    with refused("`token`", "integers", "float32"):
        built.step(jnp.zeros((2,)), built.init_cache((2,)))


@SCANS
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 4, 1)])
def test_segment_ids_of_another_shape(scan, shape):
    built = model(scan=scan)
    words = ("`segment_ids`", "(2, 4)", str(shape))
    with refused(*words):
        built(ids(2, 4), segment_ids=ids(*shape))
    with refused(*words):
        built.prefill(ids(2, 4), built.init_cache((2,)), segment_ids=ids(*shape))
    with refused(*words):
        generate(built, ids(2, 4), segment_ids=ids(*shape), max_new_tokens=1, key=KEY)


@SCANS
@pytest.mark.parametrize("batch", [(), (3,), (1,), (2, 1)])
def test_a_cache_of_other_batch_axes(scan, batch):
    built = model(scan=scan)
    words = ("cache", "init_cache", "batch")
    with refused(*words):
        built.prefill(ids(2, 4), built.init_cache(batch))
    with refused(*words):
        built.step(ids(2), built.init_cache(batch))


@SCANS
def test_a_cache_of_another_model(scan):
    built = model(scan=scan)
    others = [
        model(3, scan=scan),
        model(1, scan=scan),
        model(scan=not scan),
        model(scan=scan, d_conv=2),
        model(scan=scan, expand=1),
    ]
    for other in others:
        with refused("cache", "init_cache"):
            built.prefill(ids(2, 4), other.init_cache((2,)))
        with refused("cache", "init_cache"):
            built.step(ids(2), other.init_cache((2,)))


@SCANS
@pytest.mark.parametrize("cache", [None, (), 3, [None, None], (None, None)], ids=str)
def test_something_that_is_no_cache(scan, cache):
    with refused("cache", "init_cache"):
        model(scan=scan).step(ids(2), cache)


@SCANS
def test_active_dropout_without_a_key(scan):
    built = model(scan=scan, dropout=0.2)
    with refused("`key`", "inference_mode"):
        built(ids(4))
    eqx.nn.inference_mode(built)(ids(4))


# arguments of generate, what the message says
GENERATE = [
    ({"max_new_tokens": 0}, ["`max_new_tokens`", "positive", "0"]),
    ({"max_new_tokens": -2}, ["`max_new_tokens`", "positive", "-2"]),
    ({"max_new_tokens": 2.5}, ["`max_new_tokens`", "integer", "2.5"]),
    ({"prompt": jnp.zeros((2, 3))}, ["`prompt`", "integers", "float32"]),
    ({"temperature": -0.5}, ["`temperature`", "0 or greater", "-0.5"]),
    ({"temperature": float("nan")}, ["`temperature`", "nan"]),
    ({"top_k": 0}, ["`top_k`", "positive", "0"]),
    ({"top_k": -3}, ["`top_k`", "positive", "-3"]),
    ({"top_p": 0.0}, ["`top_p`", "above 0", "0.0"]),
    ({"top_p": -0.1}, ["`top_p`", "above 0", "-0.1"]),
    ({"top_p": 1.1}, ["`top_p`", "at most 1", "1.1"]),
    ({"top_p": float("nan")}, ["`top_p`", "nan"]),
    ({"key": None}, ["`key`", "temperature=0"]),
    ({"stop_token": -1}, ["`stop_token`", "-1"]),
    ({"prompt": ids(2, 0)}, ["`prompt`", "at least one", "(2, 0)"]),
    ({"prompt": ids(0)}, ["`prompt`", "at least one", "(0,)"]),
    ({"prompt": ids()}, ["`prompt`", "at least one", "()"]),
]


@pytest.mark.parametrize(("arguments", "words"), GENERATE)
def test_arguments_of_generate(arguments, words):
    call: dict[str, Any] = {"prompt": ids(2, 3), "max_new_tokens": 2, "key": KEY}
    with refused(*words):
        generate(model(), **(call | arguments))
