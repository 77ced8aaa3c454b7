"""Bad arguments of embeddings: the message names the argument and says what to do."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused

from capibara_eqx.layers import (
    ByteEmbedding,
    LearnedPositions,
    PatchEmbedding,
    TokenEmbedding,
    sinusoidal_positions,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)


def builder(layer: Any, **defaults: Any) -> Any:
    """A function that builds the layer, with some arguments changed."""
    return lambda **options: layer(**(defaults | {"key": KEY} | options))


token = builder(TokenEmbedding, vocab_size=5, d_model=4)
learned = builder(LearnedPositions, max_len=6, d_model=4)
byte = builder(ByteEmbedding, d_model=4)
patch = builder(PatchEmbedding, image_size=6, patch_size=3, d_model=4)
sinusoids = functools.partial(sinusoidal_positions, jnp.arange(3))

# constructor, arguments, what the message says
BAD = [
    (token, {"vocab_size": 0}, ["`vocab_size`", "0", "positive integer"]),
    (token, {"d_model": 2.5}, ["`d_model`", "2.5"]),
    (token, {"positions": "lerned"}, ["`positions`", "Did you mean 'learned'"]),
    (token, {"positions": "learned"}, ["`max_len`", "learned", "None"]),
    (token, {"positions": "learned", "max_len": 0}, ["`max_len`", "0"]),
    (token, {"max_len": 8}, ["`max_len`", "8", '"none"']),
    (
        token,
        {"positions": "sinusoidal", "max_len": 8},
        ["`max_len`", "only then", '"sinusoidal"'],
    ),
    (token, {"dropout_p": 1.5}, ["`dropout_p`", "1.5", "between 0 and 1"]),
    (learned, {"max_len": -1}, ["`max_len`", "-1"]),
    (learned, {"d_model": 0}, ["`d_model`", "0"]),
    (byte, {"d_model": 0}, ["`d_model`", "0"]),
    (byte, {"num_special": -1}, ["`num_special`", "-1"]),
    (byte, {"num_special": 1.5}, ["`num_special`", "1.5", "integer"]),
    (byte, {"num_special": "3"}, ["`num_special`", "'3'"]),
    (byte, {"num_special": False}, ["`num_special`", "False"]),
    (byte, {"num_special": True}, ["`num_special`", "True"]),
    (patch, {"image_size": 0}, ["`image_size`", "0"]),
    (patch, {"image_size": (6, 6, 3)}, ["`image_size`", "(6, 6, 3)", "height, width"]),
    (patch, {"patch_size": (3, -1)}, ["`patch_size`", "-1"]),
    (patch, {"patch_size": 4}, ["`patch_size`", "(4, 4)", "(6, 6)", "divide", "pad"]),
    (patch, {"image_size": (6, 7)}, ["`patch_size`", "(3, 3)", "(6, 7)"]),
    (patch, {"patch_size": 12}, ["`patch_size`", "divide"]),
    (patch, {"d_model": "8"}, ["`d_model`", "'8'"]),
    (patch, {"in_channels": 0}, ["`in_channels`", "0"]),
    (patch, {"positions": "sine"}, ["`positions`", "'sine'", "'sinusoidal'"]),
    (sinusoids, {"d_model": 0}, ["`d_model`", "0"]),
    (sinusoids, {"d_model": 4, "base": 0.0}, ["`base`", "positive"]),
]


@pytest.mark.parametrize(("build", "arguments", "words"), BAD)
def test_arguments_that_do_not_fit(build, arguments, words):
    with refused(*words):
        build(**arguments)


def floats(*shape):
    return jnp.zeros(shape)


def ids(*shape):
    return jnp.zeros(shape, "int32")


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_ids_that_are_no_integers(dtype):
    bad, words = jnp.zeros((3,), dtype), ("integers", dtype, "astype")
    with refused("TokenEmbedding", "`tokens`", *words):
        token()(bad)
    with refused("TokenEmbedding", "`tokens`", *words):
        token().step(bad[0], token().init_cache())
    with refused("ByteEmbedding", "`tokens`", *words):
        byte()(bad)
    with refused("LearnedPositions", "`positions`", *words):
        learned()(bad)
    with refused("sinusoidal_positions", "`positions`", *words):
        sinusoidal_positions(bad, 4)
    with refused("TokenEmbedding", "`positions`", *words):
        token(positions="sinusoidal")(ids(3), positions=bad)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_tokens_that_are_no_sequence(shape):
    words = ("TokenEmbedding", "`tokens`", "sequence", str(shape), "step")
    with refused(*words):
        token()(ids(*shape))
    with refused(*words):
        token().prefill(ids(*shape), token().init_cache())


def test_arguments_of_another_shape():
    layer = token(positions="sinusoidal")
    with refused("TokenEmbedding", "`segment_ids`", "(2, 3)", "(3,)"):
        layer(ids(2, 3), segment_ids=ids(3))
    with refused("TokenEmbedding", "`positions`", "(2, 3)", "(3,)"):
        layer(ids(2, 3), positions=ids(3))


def test_positions_that_would_be_ignored():
    with refused("TokenEmbedding", "`positions`", '"none"', '"learned"'):
        token()(ids(3), positions=ids(3))


def test_more_tokens_than_learned_positions():
    layer = token(positions="learned", max_len=4)
    with refused("TokenEmbedding", "`tokens`", "5", "4", "`max_len`", "segment_ids"):
        layer(ids(5))


@pytest.mark.parametrize("cache", [None, (), token().init_cache((3,))])
def test_a_cache_that_does_not_fit(cache):
    with refused("TokenEmbedding", "`cache", "init_cache"):
        token().prefill(ids(2, 3), cache)
    with refused("TokenEmbedding", "`cache", "init_cache"):
        token().step(ids(2), cache)


def test_active_dropout_without_a_key():
    with refused("Dropout", "`key`", "inference_mode"):
        token(dropout_p=0.5)(ids(3))
    eqx.nn.inference_mode(token(dropout_p=0.5))(ids(3))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (ids(2, 3), ["(2, 3)", "row by row"]),
        (np.zeros(3), ["integers", "float64"]),
        (np.asarray([1, 256]), ["between 0 and 255", "256", "`num_special`"]),
        (np.asarray([-1]), ["between 0 and 255", "-1"]),
    ],
)
def test_ids_that_cannot_be_decoded(bad, words):
    with refused("ByteEmbedding.decode", "`ids`", *words):
        byte().decode(bad)


@pytest.mark.parametrize(
    "shape", [(6, 6), (1, 6, 6), (3, 6, 5), (6, 6, 3), (2, 3, 9, 6)]
)
def test_images_of_another_size(shape):
    with refused("PatchEmbedding", "`images`", "(3, 6, 6)", str(shape), "Resize"):
        patch()(floats(*shape))


def test_images_of_integers():
    with refused("PatchEmbedding", "`images`", "uint8", "255"):
        patch()(jnp.zeros((3, 6, 6), "uint8"))
