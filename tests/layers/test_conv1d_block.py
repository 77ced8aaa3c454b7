"""The convolution block against NumPy's convolution and the loops."""

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
from support import numpy_oracles as oracles
from support.layer_cases import packed_rows, seeds
from support.mamba_oracle import ACTIVATIONS
from support.tolerances import assert_close

from capibara_eqx.layers import Conv1DBlock, LayerNorm, RMSNorm


# in_channels, out_channels, kernel_size, further arguments
BLOCKS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "dense": (3, 5, 4, {"activation": None}),
    "depthwise": (3, 3, 3, {"groups": 3, "activation": "relu"}),
    "grouped": (6, 4, 3, {"groups": 2, "dilation": 2, "activation": "gelu"}),
    "rms": (4, 4, 2, {"norm": "rms", "residual": True}),
    "layer": (2, 5, 3, {"norm": "layer", "use_bias": False}),
}


@functools.cache
def make(name, causal=True):
    c_in, c_out, width, options = BLOCKS[name]
    block = Conv1DBlock(
        c_in, c_out, width, causal=causal, **options, key=jax.random.key(0)
    )
    if block.norm is None:
        return block
    # Weights and biases of a norm that can be seen.
    rng = np.random.default_rng(0)

    def noisy(leaf):
        noise = rng.standard_normal(leaf.shape)
        return leaf + jnp.asarray(noise, leaf.dtype)

    return eqx.tree_at(lambda b: b.norm, block, jax.tree.map(noisy, block.norm))


@functools.cache
def compiled():
    return eqx.filter_jit(lambda block, x, ids: block(x, segment_ids=ids))


def finished(block, x, y):
    """Norm, activation and residual after the convolution, in NumPy."""
    if isinstance(block.norm, LayerNorm):
        weight, bias = np.asarray(block.norm.weight), np.asarray(block.norm.bias)
        y = oracles.layer_norm(y, weight, bias)
    elif isinstance(block.norm, RMSNorm):
        y = oracles.rms_norm(y, np.asarray(block.norm.weight))
    y = ACTIVATIONS[block.activation](y)
    return oracles.wide(x) + y if block.residual else y


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@pytest.mark.parametrize("name", BLOCKS)
@given(rows=st.none() | packed_rows, seed=seeds)
def test_values_are_those_of_the_loops(name, rows, seed):
    block = make(name)
    x = random((6, block.in_channels), seed)
    ids = None if rows is None else np.asarray(rows, "int32")
    y, _ = oracles.causal_conv(
        x,
        np.asarray(block.weight),
        None if block.bias is None else np.asarray(block.bias),
        dilation=block.dilation,
        groups=block.groups,
        segment_ids=ids,
    )
    want = finished(block, x, y)
    if ids is not None:
        want[ids < 0] = 0
    got = compiled()(block, x, ids)
    terms = float(np.abs(x).max() * np.abs(block.weight).max())
    assert_close(got, want, dtype="float32", length=block.weight[0].size, terms=terms)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seq", [1, 2, 9])
def test_a_centred_window(name, seq):
    block = make(name, causal=False)
    x = random((seq, block.in_channels), seq)
    # The definition: tap k of output t reads token t + (k - width // 2) * dilation,
    # except that an even dilated reach is cut in the middle of the window.
    reach = (block.kernel_size - 1) * block.dilation
    behind = reach - reach // 2
    y = np.zeros((seq, block.out_channels))
    per_group = block.in_channels // block.groups
    for t in range(seq):
        for o in range(block.out_channels):
            first = o // (block.out_channels // block.groups) * per_group
            for k in range(block.kernel_size):
                at = t - behind + k * block.dilation
                if 0 <= at < seq:
                    taps = oracles.wide(block.weight)[o, :, k]
                    y[t, o] += taps @ x[at, first : first + per_group]
    y += 0 if block.bias is None else oracles.wide(block.bias)
    want = finished(block, x, y)
    assert_close(compiled()(block, x, None), want, dtype="float32", length=12)


@pytest.mark.parametrize("width", [1, 3, 4, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_one_channel_is_the_convolution_of_numpy(width, causal):
    block = Conv1DBlock(
        1,
        1,
        width,
        causal=causal,
        activation=None,
        use_bias=False,
        key=jax.random.key(width),
    )
    x = random((11, 1), width)
    taps = np.asarray(block.weight, "float64")[0, 0, ::-1]
    full = np.convolve(x[:, 0].astype("float64"), taps)
    start = 0 if causal else (width - 1) // 2
    got = compiled()(block, x, None)[:, 0]
    assert_close(got, full[start : start + 11], dtype="float32", length=width)


def test_the_window_of_an_even_kernel_reaches_further_back():
    block = Conv1DBlock(1, 1, 4, causal=False, activation=None, key=jax.random.key(0))
    sees = jax.jacobian(lambda x: block(x)[:, 0])(jnp.zeros((9, 1)))[4, :, 0]
    np.testing.assert_array_equal(np.flatnonzero(sees), [2, 3, 4, 5])


@pytest.mark.parametrize(("c_in", "groups", "width"), [(6, 1, 5), (8, 8, 4)])
def test_initial_values_are_uniform(c_in, groups, width):
    block = Conv1DBlock(c_in, 128, width, groups=groups, key=jax.random.key(0))
    limit = 1 / math.sqrt(c_in // groups * width)
    for values in (block.weight, block.bias):
        values = np.asarray(values, "float64").ravel()
        assert np.all(np.abs(values) <= limit)
        assert stats.kstest(values, "uniform", (-limit, 2 * limit)).pvalue > 1e-3


def test_parameters_in_another_dtype():
    block = Conv1DBlock(
        2, 2, 3, norm="layer", dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    leaves = jax.tree.leaves(block)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert block.init_cache((3,)).inputs.dtype == jnp.float32
    assert block(jnp.zeros((4, 2))).dtype == jnp.float32
