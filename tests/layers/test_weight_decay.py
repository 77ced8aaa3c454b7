"""Which arrays weight decay acts on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capibara_eqx.layers import Conv1DBlock, Mamba, weight_decay_mask
from capibara_eqx.models import LanguageModel, ResidualBlock


MAMBA = {
    ".in_proj.weight": True,
    ".in_proj.bias": False,
    ".conv.weight": True,
    ".conv.bias": False,
    ".x_proj.weight": True,
    ".dt_proj.weight": True,
    ".dt_proj.bias": False,
    ".A_log": False,
    ".D": False,
    ".out_proj.weight": True,
    ".out_proj.bias": False,
}


def by_path(mask):
    leaves = jax.tree.leaves_with_path(mask)
    assert all(isinstance(leaf, bool) for _, leaf in leaves)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def mamba(seed=0):
    return Mamba(3, 2, bias=True, key=jax.random.key(seed))


def model(scan, tied=False):
    blocks = [ResidualBlock(mamba(seed), 3, dropout=0.1) for seed in range(2)]
    return LanguageModel(
        7, 3, blocks, scan=scan, tie_embeddings=tied, key=jax.random.key(3)
    )


def test_mamba():
    assert by_path(weight_decay_mask(mamba())) == MAMBA


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_convolution_with_a_norm(norm):
    layer = Conv1DBlock(4, 4, 3, norm=norm, key=jax.random.key(0))
    want = {".weight": True, ".bias": False, ".norm.weight": False}
    if norm == "layer":
        want[".norm.bias"] = False
    assert by_path(weight_decay_mask(layer)) == want


@pytest.mark.parametrize("scan", [False, True])
def test_a_language_model_listed_and_scanned(scan):
    got = by_path(weight_decay_mask(model(scan)))
    want = {".embedding.weight": True, ".norm.weight": False, ".head.weight": True}
    blocks = [""] if scan else ["[0]", "[1]"]
    for block in blocks:
        prefix = f".stack.blocks{block}"
        want[f"{prefix}.norm.weight"] = False
        want |= {f"{prefix}.mixer{path}": value for path, value in MAMBA.items()}
        want |= {f"{prefix}.dropout.{name}": False for name in ("p", "inference")}
    assert got == want


def test_layers_of_equinox():
    keys = iter(jax.random.split(jax.random.key(0), 6))
    tree = {
        "linear": eqx.nn.Linear(3, 2, key=next(keys)),
        "conv": [eqx.nn.Conv1d(3, 2, 2, key=next(keys))],
        "norm": eqx.nn.LayerNorm(3),
        "embedding": eqx.nn.Embedding(3, 2, key=next(keys)),
        "mlp": eqx.nn.MLP(2, 2, 2, 1, key=next(keys)),
    }
    arrays = eqx.filter(tree, eqx.is_inexact_array)
    assert by_path(weight_decay_mask(arrays)) == {
        "['linear'].weight": True,
        "['linear'].bias": False,
        "['conv'][0].weight": True,
        "['conv'][0].bias": False,
        "['norm'].weight": False,
        "['norm'].bias": False,
        "['embedding'].weight": True,
        "['mlp'].layers[0].weight": True,
        "['mlp'].layers[0].bias": False,
        "['mlp'].layers[1].weight": True,
        "['mlp'].layers[1].bias": False,
    }


def test_a_bias_by_another_name():
    cell = eqx.nn.GRUCell(3, 2, key=jax.random.key(0))
    assert by_path(weight_decay_mask(eqx.filter(cell, eqx.is_inexact_array))) == {
        ".weight_ih": True,
        ".weight_hh": True,
        ".bias": False,
        ".bias_n": False,
    }


def test_a_layer_names_its_own_exceptions():
    class Owner(eqx.Module):
        no_weight_decay = frozenset({"gain"})
        gain: jax.Array
        matrix: jax.Array

    got = by_path(weight_decay_mask([Owner(jnp.ones(2), jnp.ones((2, 2)))]))
    assert got == {"[0].gain": False, "[0].matrix": True}


@pytest.mark.parametrize("scan", [False, True])
def test_an_optimizer_decays_these_and_no_others(scan):
    params = eqx.filter(model(scan), eqx.is_inexact_array)
    params = jax.tree.map(jnp.ones_like, params)
    decay = optax.add_decayed_weights(0.5, mask=weight_decay_mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    update, _ = decay.update(zero, decay.init(params), params)
    mask = jax.tree.leaves(weight_decay_mask(params))
    for decays, delta in zip(mask, jax.tree.leaves(update), strict=True):
        np.testing.assert_array_equal(delta, np.full(delta.shape, 0.5 * decays))
