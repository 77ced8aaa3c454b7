"""What is not finite in one document spoils no other, and nothing before it."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.layers import (
    DeltaNet,
    MesaNet,
    MetaLinearAttention,
    TTTLinear,
    delta_rule,
)
from capibara_eqx.layers._linear_attention import linear_attention


WIDTH, HEADS = 8, 2
AT, END = 2, 5  # the token that is not finite, and where its document ends
IDS = jnp.array([0] * END + [1] * 7)
LAYERS: dict[str, Any] = {
    "delta_net": functools.partial(DeltaNet, use_short_conv=False, chunk_size=4),
    "delta_net_gated": functools.partial(DeltaNet, gated=True, chunk_size=12),
    "meta_linear_attention": MetaLinearAttention,
    "ttt_linear": functools.partial(TTTLinear, mini_batch_size=8),
    "mesa_net": functools.partial(MesaNet, cg_steps=4),
}


def layer_of(name):
    return LAYERS[name](WIDTH, HEADS, key=jax.random.key(0))


@functools.cache
def x_of(length=12):
    return jax.random.normal(jax.random.key(1), (length, WIDTH))


NAMES = [
    name if name == "delta_net" else pytest.param(name, marks=pytest.mark.slow)
    for name in LAYERS
]


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", NAMES)
def test_layers(name, value):
    layer, x = layer_of(name), x_of()

    @eqx.filter_jit
    def read(x):
        return layer.prefill(x, layer.init_cache(), segment_ids=IDS)

    want, want_cache = read(x)
    got, cache = read(x.at[AT].set(value))
    assert not np.any(np.isfinite(got[AT:END]))
    for part in (slice(0, AT), slice(END, None)):
        assert_close(got[part], want[part], dtype="float32", length=WIDTH)
    for have, expected in zip(
        jax.tree.leaves(cache), jax.tree.leaves(want_cache), strict=True
    ):
        np.testing.assert_allclose(have, expected, rtol=1e-5, atol=1e-6)
    # Within the document the state is lost, as it is token by token.
    _, cache = layer.prefill(x[:4].at[AT].set(value), layer.init_cache())
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_step_reads_is_lost_to_all_that_follow(name, value):
    """A step contains nothing, since everything that it reads reaches its output."""
    layer, x = layer_of(name), x_of()
    step = eqx.filter_jit(lambda x, cache: layer.step(x, cache))
    _, cache = step(x[0], layer.init_cache())
    # More tokens than a convolution and a mini-batch have.
    for token in (x[1].at[2].set(value), *x[2:]):
        y, cache = step(token, cache)
        assert not np.any(np.isfinite(y))


@functools.cache
def parts():
    keys = jax.random.split(jax.random.key(2), 5)
    shape = (12, HEADS, 3)
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    state = jax.random.normal(keys[4], (HEADS, 3, 3))
    return q, k, v, state


def rule(q, k, v, state, reset):
    beta = jnp.full(q.shape[:-1], 0.5)
    decay = jnp.full(q.shape[:-1], -0.1)
    return delta_rule(
        q, k, v, beta, log_decay=decay, initial_state=state, reset=reset, chunk_size=5
    )


def channels(q, k, v, state, reset):
    decay = jnp.full(q.shape, -0.1)
    return linear_attention(
        q, k, v, decay, initial_state=state, reset=reset, chunk_size=5
    )


@pytest.mark.parametrize("function", [rule, channels])
def test_what_reaches_whom(function):
    """What is written reaches the rest of a document, what is read with its token."""
    q, k, v, state = parts()
    reset = jnp.arange(12) == 6
    run = jax.jit(function)
    want, _ = run(q, k, v, state, reset)
    for changed, lost in (
        ((q.at[3, 1, 0].set(jnp.nan), k, v, state), {3}),
        ((q, k.at[3, 1, 0].set(jnp.inf), v, state), {3, 4, 5}),
        ((q, k, v.at[8, 1, 2].set(-jnp.inf), state), {8, 9, 10, 11}),
        ((q, k, v, state.at[1, 0, 0].set(jnp.nan)), set(range(6))),
    ):
        o, after = run(*changed, reset)
        kept = [t for t in range(12) if t not in lost]
        assert not np.any(np.isfinite(o[np.array(sorted(lost)), 1]))
        assert_close(o[np.array(kept), 1], want[np.array(kept), 1], dtype="float32")
        # The other head has nothing to do with it.
        assert_close(o[:, 0], want[:, 0], dtype="float32")
        assert np.all(np.isfinite(after[1])) == (11 not in lost)
        assert np.all(np.isfinite(after[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("inside", "outside"),
    [("float64", "float32"), ("float32", "float64"), ("float32", "bfloat16")],
)
def test_one_token_in_another_dtype_than_the_parameters(name, inside, outside):
    """As a row of more does it: a step gives the dtype of its input."""
    with enable_x64(True):
        layer = LAYERS[name](WIDTH, HEADS, dtype=inside, key=jax.random.key(0))
        x = x_of(2).astype(outside)
        whole = layer(x)
        y, cache = layer.step(x[0], layer.init_cache())
        second, _ = layer.step(x[1], cache)
        alone = layer(x[:1])
    assert {whole.dtype, y.dtype, second.dtype} == {jnp.dtype(outside)}
    rough = "bfloat16" if outside == "bfloat16" else "float32"
    got = np.stack([np.asarray(y, "float64"), np.asarray(second, "float64")])
    assert_close(got, np.asarray(whole, "float64"), dtype=rough, length=WIDTH)
    assert_close(alone[0], y, dtype=rough, length=WIDTH)
