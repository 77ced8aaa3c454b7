"""Bad arguments of models with a diffusion head: the message says what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.layers import DiffusionNextTokenHead
from capibara_eqx.models import (
    diffusion_generate,
    diffusion_language_loss,
    mamba_language_model,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
MODEL = mamba_language_model(7, 3, 1, d_state=2, key=KEY)


def head(d_model: int = 3, enabled: bool = True) -> DiffusionNextTokenHead:
    return DiffusionNextTokenHead(d_model, enabled, time_embed_dim=6, key=KEY)


def ids(*shape, dtype="int32"):
    return jnp.zeros(shape, dtype)


# arguments, what the message says
LOSS = [
    ({"tokens": ids(2, 1)}, ["`tokens`", ">= 2", "(2, 1)"]),
    ({"tokens": ids()}, ["`tokens`", ">= 2", "()"]),
    ({"tokens": ids(2, 3, dtype="float32")}, ["`tokens`", "integers", "float32"]),
    ({"segment_ids": ids(2, 4)}, ["`segment_ids`", "(2, 5)", "(2, 4)"]),
    ({"key": None}, ["`key`"]),
    ({"head": head(5)}, ["`head`", "d_model", "3", "5"]),
    (
        {"head": head(enabled=False), "freeze_backbone": True},
        ["`freeze_backbone`", "not enabled", "enabled=True"],
    ),
]


@pytest.mark.parametrize(("arguments", "words"), LOSS)
def test_arguments_of_the_loss(arguments, words):
    call: dict[str, Any] = {"head": head(), "tokens": ids(2, 5), "key": KEY}
    with refused(*words):
        diffusion_language_loss(MODEL, **(call | arguments))


GENERATE = [
    ({"max_new_tokens": 0}, ["`max_new_tokens`", "positive", "0"]),
    ({"prompt": ids(2, 0)}, ["diffusion_generate", "`prompt`", "at least one"]),
    ({"prompt": ids(2, 3, dtype="float32")}, ["diffusion_generate", "integers"]),
    ({"segment_ids": ids(2, 4)}, ["diffusion_generate", "`segment_ids`", "(2, 4)"]),
    ({"head_share": 1.5}, ["`head_share`", "between 0 and 1", "1.5"]),
    ({"head_share": float("nan")}, ["`head_share`", "nan"]),
    ({"temperature": -1.0}, ["`temperature`", "0 or greater"]),
    ({"top_k": 0}, ["`top_k`", "positive"]),
    ({"top_p": 0.0}, ["`top_p`", "above 0"]),
    ({"stop_token": -1}, ["`stop_token`", "-1"]),
    ({"key": None}, ["diffusion_generate", "`key`"]),
    ({"key": None, "head": head(enabled=False)}, ["generate", "`key`"]),
    ({"head": head(4)}, ["`head`", "d_model", "3", "4"]),
]


@pytest.mark.parametrize(("arguments", "words"), GENERATE)
def test_arguments_of_generate(arguments, words):
    call: dict[str, Any] = {
        "head": head(),
        "prompt": ids(2, 3),
        "max_new_tokens": 2,
        "key": KEY,
    }
    with refused(*words):
        diffusion_generate(MODEL, **(call | arguments))
