"""Patches of images: against an unfolding loop in float64 and Equinox's convolution."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.derivatives import check_first_order, check_second_order
from support.layer_cases import seeds
from support.numpy_oracles import sinusoidal_positions as waves
from support.numpy_oracles import wide
from support.quick import built, filled
from support.tolerances import assert_close

from capibara_eqx.layers import PatchEmbedding, weight_decay_mask


# image, patch, channels
SIZES = [((6, 4), (3, 2), 2), ((5, 5), (5, 5), 1), ((3, 8), (1, 4), 3)]


@functools.cache
def compiled():
    return eqx.filter_jit(lambda layer, x: layer(x))


@functools.cache
def patches(image=(6, 4), patch=(3, 2), channels=2, **options) -> Any:
    sizes = (image, patch, 5, channels)
    return filled(PatchEmbedding, *sizes, **options, seed=0, size=0.5)


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def unfolded(weight, image, patch):
    """One patch after the other, one output after the other; no bias."""
    channels, height, width = image.shape
    rows = []
    for top in range(0, height, patch[0]):
        for left in range(0, width, patch[1]):
            cut = image[:, top : top + patch[0], left : left + patch[1]]
            kernels = weight.reshape(-1, channels, *patch)
            rows.append([np.sum(kernel * cut) for kernel in kernels])
    return np.stack(rows)


def embedded(layer, image):
    y = unfolded(wide(layer.proj.weight), wide(image), layer.patch_size)
    if layer.proj.bias is not None:
        y = y + wide(layer.proj.bias)
    if layer.class_token is not None:
        y = np.concatenate([wide(layer.class_token)[None], y])
    if layer.positions == "sinusoidal":
        y = y + waves(np.arange(len(y)), 5)
    if layer.positions == "learned":
        y = y + wide(layer.learned.weight)
    return y


@pytest.mark.parametrize("size", SIZES)
@given(batch=st.sampled_from([(), (2,), (2, 3)]), seed=seeds)
def test_patches_are_unfolded_and_mapped(size, batch, seed):
    layer = patches(*size)
    x = random((*batch, layer.in_channels, *layer.image_size), seed)
    got = compiled()(layer, x)
    length = layer.proj.in_features
    for row in np.ndindex(batch):
        assert_close(got[row], embedded(layer, x[row]), dtype="float32", length=length)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_options(class_token, positions, use_bias):
    options = {"class_token": class_token, "positions": positions, "use_bias": use_bias}
    layer = patches(**options)
    x = random((2, 6, 4), 0)
    want = embedded(layer, x)
    assert want.shape == (layer.length, 5) == (4 + class_token, 5)
    assert_close(compiled()(layer, x), want, dtype="float32", length=12)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(layer)]
    assert (".class_token" in names) == class_token
    assert (".learned.weight" in names) == (positions == "learned")
    assert (".proj.bias" in names) == use_bias


@pytest.mark.parametrize("size", SIZES[:2])
def test_a_convolution_of_equinox_gives_the_same(size):
    """Its kernel is our weight, reshaped."""
    layer = patches(*size)
    patch = layer.patch_size
    sizes = (layer.in_channels, 5, patch, patch)
    conv = filled(eqx.nn.Conv2d, *sizes, seed=1, size=1.0)
    weight = layer.proj.weight.reshape(conv.weight.shape)
    bias = layer.proj.bias[:, None, None]
    conv = eqx.tree_at(lambda m: (m.weight, m.bias), conv, (weight, bias))
    x = jnp.asarray(random((layer.in_channels, *layer.image_size), 0))
    want = np.asarray(eqx.filter_jit(conv)(x)).reshape(5, -1).T
    got = compiled()(layer, x)
    assert_close(got, want, dtype="float32", length=layer.proj.in_features)


def test_the_size_of_an_image_may_be_one_number():
    layer = filled(PatchEmbedding, 224, 16, 768, seed=0, size=1.0)
    assert (layer.grid, layer.num_patches, layer.length) == ((14, 14), 196, 196)
    assert layer.proj.weight.shape == (768, 3 * 16 * 16)
    wide_one = filled(PatchEmbedding, (32, 48), (8, 16), 4, 1, seed=0, size=1.0)
    assert (wide_one.grid, wide_one.num_patches) == ((4, 3), 12)


def test_initial_values():
    sizes = (32, 4, 40, 3, True, "learned")
    layer = built(PatchEmbedding, *sizes, key=jax.random.key(0))
    np.testing.assert_array_equal(layer.class_token, np.zeros(40))
    values = np.asarray(layer.learned.weight, "float64").ravel()
    assert stats.kstest(values / 0.02, "norm").pvalue > 1e-3
    limit = 1 / math.sqrt(48)
    values = np.asarray(layer.proj.weight, "float64").ravel()
    assert stats.kstest(values, "uniform", (-limit, 2 * limit)).pvalue > 1e-3


def test_a_pixel_reaches_its_patch_alone():
    layer = patches(class_token=True, positions="learned")
    x = jnp.asarray(random((2, 6, 4), 0))
    other = np.array(x)
    other[1, 4, 1] += 1.0
    before, after = compiled()(layer, x), compiled()(layer, jnp.asarray(other))
    changed = np.any(np.asarray(before) != np.asarray(after), axis=-1)
    # Row 4 is in the second row of patches, column 1 in the first column.
    np.testing.assert_array_equal(np.flatnonzero(changed), [1 + 2])


def test_derivatives():
    rng = np.random.default_rng(0)
    shapes = {
        "image": (1, 4, 2),
        "weight": (3, 4),
        "bias": (3,),
        "token": (3,),
        "learned": (3, 3),
    }
    point = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    readout = rng.standard_normal((3, 3))
    sizes = ((4, 2), 2, 3, 1, True, "learned")
    layer = filled(PatchEmbedding, *sizes, seed=0, size=1.0)

    def function(arrays):
        built = eqx.tree_at(
            lambda m: (m.proj.weight, m.proj.bias, m.class_token, m.learned.weight),
            layer,
            tuple(arrays[name] for name in ("weight", "bias", "token", "learned")),
        )
        return jnp.sum(jnp.asarray(readout) * jnp.sin(built(arrays["image"])))

    def oracle(point):
        y = unfolded(point["weight"], point["image"], (2, 2)) + point["bias"]
        y = np.concatenate([point["token"][None], y]) + point["learned"]
        return float(np.sum(readout * np.sin(y)))

    check_first_order(function, oracle, point)
    check_second_order(function, oracle, point)


def test_matrices_decay_and_places_do_not():
    mask = weight_decay_mask(patches(class_token=True, positions="learned"))
    decays = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(mask)
    }
    assert [name for name, leaf in decays.items() if leaf] == [".proj.weight"]
