"""The language model of Mamba-2 blocks: what its arguments make."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import numpy_oracles as oracles
from support.mamba2_oracle import mamba2_row, parameters, settings
from support.messages import refused
from support.model_oracle import blocks_of, moved
from support.numpy_oracles import wide
from support.quick import built
from support.tolerances import assert_close

from capibara_eqx.layers import Mamba2
from capibara_eqx.models import mamba2_language_model


VOCAB, D = 11, 4
SIZES: dict[str, Any] = {"d_state": 3, "head_dim": 2, "n_groups": 2}
make: Any = mamba2_language_model


def logits_of(model, tokens):
    """Of one document, by NumPy loops."""
    table = wide(model.embedding.weight)
    x = table[tokens]
    for block in blocks_of(model.stack):
        normed = oracles.rms_norm(x, block.norm.weight, block.norm.eps)
        mixer = block.mixer
        x = x + mamba2_row(parameters(mixer), normed, settings(mixer))[0]
    x = oracles.rms_norm(x, model.norm.weight, model.norm.eps)
    return x @ (table if model.head is None else wide(model.head.weight)).T


@pytest.mark.parametrize(("scan", "tied"), [(True, False), (False, True)])
def test_logits_are_those_of_the_loops(scan, tied):
    options = {"scan": scan, "tie_embeddings": tied, **SIZES}
    model = moved(built(make, VOCAB, D, 2, key=jax.random.key(0), **options), 0)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 6)
    found = eqx.filter_jit(model)(jnp.asarray(tokens, "int32"))
    assert_close(found, logits_of(model, tokens), dtype="float32", length=50)


@pytest.mark.parametrize("n_layers", [1, 4])
def test_output_maps_start_smaller_in_deeper_models(n_layers):
    sizes = {"d_state": 1, "head_dim": 8}
    model = built(make, VOCAB, 16, n_layers, key=jax.random.key(1), **sizes)
    limit = 1 / np.sqrt(32 * n_layers)
    for block in blocks_of(model.stack):
        largest = np.max(np.abs(block.mixer.out_proj.weight))
        assert 0.9 * limit < largest <= limit * (1 + 1e-6)


def test_arguments_reach_the_parts():
    options = {"dropout": 0.25, "remat": "full", "dtype": jnp.bfloat16}
    model = built(make, VOCAB, D, 2, key=jax.random.key(1), **options, **SIZES)
    block = model.stack.blocks[1]
    mixer = block.mixer
    assert model.stack.remat == "full"
    assert block.dropout.p == 0.25
    assert type(mixer) is Mamba2
    assert (mixer.d_state, mixer.head_dim, mixer.n_groups) == (3, 2, 2)
    parts = [model.embedding, model.norm, block.norm, mixer.in_proj]
    assert {part.weight.dtype for part in parts} == {jnp.dtype("bfloat16")}


@pytest.mark.errors
@pytest.mark.parametrize("name", ["vocab_size", "d_model", "n_layers"])
def test_sizes_that_are_not_positive(name):
    sizes = {"vocab_size": 7, "d_model": D, "n_layers": 1, **SIZES}
    with refused(f"`{name}`", "0", "positive"):
        make(key=jax.random.key(0), **(sizes | {name: 0}))
