"""The hybrid layer: its choice by length, and its mix."""

import collections
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support import attention_oracle
from support import numpy_oracles as oracles
from support.derivatives import check_first_order
from support.layer_cases import packed_rows, seeds
from support.mamba_oracle import mamba_row, parameters
from support.numpy_oracles import documents
from support.quick import filled
from support.small_layers import hybrid
from support.tolerances import assert_close

from capibara_eqx.layers import (
    Attention,
    Conv1DBlock,
    HybridSSM,
    Mamba,
)
from capibara_eqx.models import LanguageModel, ResidualBlock, model_cost


THRESHOLD = 5
KEY = jax.random.key(0)
sides = pytest.mark.parametrize(
    ("length", "branch"), [(THRESHOLD, "attention"), (THRESHOLD + 1, "ssm")]
)


@functools.cache
def layer_of(mode):
    return filled(hybrid, seed=0, size=0.5, mode=mode, ssm_threshold=THRESHOLD)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@eqx.filter_jit
def call(layer, x, **options):
    return layer(x, **options)


@eqx.filter_jit
def step(layer, x, cache):
    return layer.step(x, cache)


@eqx.filter_jit
def prefill(layer, x, cache, ids=None):
    return layer.prefill(x, cache, segment_ids=ids)


def by_loops(layer, x, branch):
    """A document through a branch, in NumPy."""
    if branch == "ssm":
        return mamba_row(parameters(layer.ssm), x)[0]
    return attention_oracle.attention_row(layer.attention, x)


def mixed_by_loops(layer, x):
    scores = attention_oracle.affine(layer.gate, oracles.wide(x))
    g = 1 / (1 + np.exp(-scores))
    return g * by_loops(layer, x, "ssm") + (1 - g) * by_loops(layer, x, "attention")


@sides
def test_a_switch_is_the_branch_of_the_length(length, branch):
    layer, x = layer_of("switch"), random((length, 4))
    assert layer.select_branch(length) == branch
    y = call(layer, x)
    np.testing.assert_array_equal(y, call(getattr(layer, branch), x))
    assert_close(y, by_loops(layer, x, branch), dtype="float32", length=60)


@sides
def test_a_stream_of_a_length_is_the_call_of_that_length(length, branch):
    layer, x = layer_of("switch"), random((length, 4), 1)
    cache = layer.init_cache(max_len=length)
    assert (cache.ssm is None) == (branch == "attention")
    assert (cache.attention is None) == (branch == "ssm")
    # Far fewer tokens than the threshold: the cache decides, not the chunk.
    y, cache = prefill(layer, x[:3], cache)
    parts = [*y]
    for token in x[3:]:
        y, cache = step(layer, token, cache)
        parts.append(y)
    assert_close(np.stack(parts), call(layer, x), dtype="float32", length=60)


def test_a_cache_of_a_given_branch():
    layer, x = layer_of("switch"), random((2, 4), 2)
    assert layer.init_cache(branch="ssm").attention is None
    assert layer.init_cache(max_len=THRESHOLD, branch="ssm").attention is None
    long = layer.init_cache(max_len=100, branch="attention")
    assert long.ssm is None
    assert long.attention.slots == 100
    y, _ = prefill(layer, x, long)
    assert_close(y, by_loops(layer, x, "attention"), dtype="float32", length=60)


IDS = jnp.asarray([-1, 3, 3, 8, 8, 8, 3, -1], "int32")


@pytest.mark.parametrize("branch", ["ssm", "attention"])
def test_packed_rows_take_the_branch_that_is_named(branch):
    layer, x = layer_of("switch"), random((8, 4), 3)
    y = call(layer, x, segment_ids=IDS, branch=branch)
    want = call(getattr(layer, branch), x, segment_ids=IDS)
    np.testing.assert_array_equal(y, want)
    for positions in documents(np.asarray(IDS)):
        want = by_loops(layer, np.asarray(x)[positions], branch)
        assert_close(np.asarray(y)[positions], want, dtype="float32", length=60)
    read, _ = prefill(layer, x, layer.init_cache(max_len=8, branch=branch), IDS)
    assert_close(read, y, dtype="float32", length=60)


def test_one_branch_is_traced_and_once_a_length():
    traces = collections.Counter()

    class Counted(Conv1DBlock):
        name: str = eqx.field(static=True)

        def __init__(self, name):
            super().__init__(3, 3, 2, key=KEY)
            self.name = name

        def __call__(self, x, **options):
            traces[self.name] += 1
            return super().__call__(x, **options)

    layer = HybridSSM(3, 4, ssm=Counted("ssm"), attention=Counted("attention"), key=KEY)
    for length in (4, 4, 5, 5):
        call(layer, random((length, 3), length))
    assert traces == {"attention": 1, "ssm": 1}


@given(row=packed_rows, seed=seeds)
def test_a_mix_is_the_gated_sum_of_the_loops(row, seed):
    layer, x = layer_of("mix"), random((len(row), 4), seed)
    y = np.asarray(call(layer, x, segment_ids=jnp.asarray(row, "int32")))
    for positions in documents(np.asarray(row)):
        want = mixed_by_loops(layer, np.asarray(x)[positions])
        assert_close(y[positions], want, dtype="float32", length=60)


def test_derivatives_of_a_mix():
    """Of the input, the gate and both branches."""

    def build(*, key):
        ssm, attention = (Conv1DBlock(2, 2, 2, activation=None, key=key) for _ in "ab")
        return HybridSSM(2, mode="mix", ssm=ssm, attention=attention, key=key)

    layer = filled(build, seed=4, size=1.0)
    fields = {
        "gate": lambda m: m.gate.weight,
        "gate_bias": lambda m: m.gate.bias,
        "ssm": lambda m: m.ssm.weight,
        "attention": lambda m: m.attention.weight,
    }
    point = {name: np.asarray(at(layer), "float64") for name, at in fields.items()}
    point["x"] = np.random.default_rng(5).standard_normal((4, 2))
    weights = np.random.default_rng(6).standard_normal((4, 2))

    def loss(arrays):
        moved = eqx.tree_at(
            lambda m: [at(m) for at in fields.values()],
            layer,
            [arrays[name] for name in fields],
        )
        return jnp.sum(weights * moved(arrays["x"]) ** 2)

    def oracle(point):
        scores = point["x"] @ point["gate"].T + point["gate_bias"]
        g = 1 / (1 + np.exp(-scores))
        ssm, attention = (
            oracles.causal_conv(point["x"], point[name], np.asarray(branch.bias))[0]
            for name, branch in (("ssm", layer.ssm), ("attention", layer.attention))
        )
        return float(np.sum(weights * (g * ssm + (1 - g) * attention) ** 2))

    check_first_order(loss, oracle, point)


def test_a_batch_trains_the_branch_of_its_length_or_both():
    def unmoved(mode):
        layer = layer_of(mode)
        gradient = eqx.filter_jit(eqx.filter_grad(lambda m, x: jnp.sum(m(x) ** 2)))(
            layer, random((THRESHOLD, 4))
        )
        leaves = jax.tree.leaves_with_path(gradient)
        still = [path for path, leaf in leaves if not np.any(leaf)]
        return {path[0].name for path in still}, len(still)

    count = len(jax.tree.leaves(eqx.filter(layer_of("switch").ssm, eqx.is_array)))
    assert unmoved("switch") == ({"ssm"}, count)
    assert unmoved("mix") == (set(), 0)


@pytest.mark.parametrize("branch", ["ssm", "attention"])
def test_one_branch_alone_takes_every_row(branch):
    other = {"ssm": "use_transformer", "attention": "use_mamba"}[branch]
    options = {"ssm_threshold": THRESHOLD, other: False}
    layer = filled(hybrid, seed=0, size=0.5, **options)
    assert layer.gate is None
    for length in (THRESHOLD, THRESHOLD + 1):
        assert layer.select_branch(length) == branch
        assert getattr(layer.init_cache(max_len=length), branch) is not None
    x = random((THRESHOLD + 1, 4))
    ids = jnp.zeros(x.shape[:1], "int32")
    np.testing.assert_array_equal(
        call(layer, x, segment_ids=ids),
        call(getattr(layer, branch), x, segment_ids=ids),
    )


def test_the_branches_that_are_built():
    def shapes(*args, **options):
        return eqx.filter_eval_shape(
            lambda key: HybridSSM(*args, **options, key=key), KEY
        )

    layer = shapes(192, dtype="bfloat16")
    assert (layer.mode, layer.ssm_threshold) == ("switch", 2048)
    assert isinstance(layer.ssm, Mamba)
    assert isinstance(layer.attention, Attention)
    assert (layer.attention.n_heads, layer.attention.rope_enabled) == (3, True)
    for weight in (layer.ssm.in_proj.weight, layer.attention.q_proj.weight):
        assert weight.shape[1] == 192
        assert weight.dtype == jnp.bfloat16
    assert shapes(10, mode="mix", dtype="bfloat16").gate.weight.dtype == jnp.bfloat16
    assert shapes(10).attention.n_heads == 1
    assert shapes(10, n_heads=5).attention.n_heads == 5


def test_keys_reach_the_branches():
    def dropped(*, key):
        attention = Attention(4, 2, dropout_p=0.5, key=key)
        return HybridSSM(4, THRESHOLD, attention=attention, mode="mix", key=key)

    mix = filled(dropped, seed=1, size=0.5)
    x, key = random((THRESHOLD, 4)), jax.random.key(3)
    same = [call(mix, x, key=key) for _ in "ab"]
    np.testing.assert_array_equal(*same)
    assert np.any(same[0] != call(mix, x, key=jax.random.key(4)))
    switch = eqx.tree_at(lambda m: m.gate, mix, None)
    np.testing.assert_array_equal(
        call(switch, x, key=key), call(switch.attention, x, key=key)
    )


def test_cost_is_that_of_the_branches_that_run():
    def cost(mixer, max_len):
        blocks = [ResidualBlock(mixer, 4)]
        model = filled(LanguageModel, 3, 4, blocks, seed=0, size=1.0)
        return model_cost(model, max_len)[1]

    switch, mix = layer_of("switch"), layer_of("mix")
    for max_len in (THRESHOLD, THRESHOLD + 1):
        alone = {
            name: cost(getattr(mix, name), max_len) for name in ("ssm", "attention")
        }
        got, want = cost(switch, max_len), alone[switch.select_branch(max_len)]
        assert (got.flops, got.state_bytes) == (want.flops, want.state_bytes)
        norm, gate = 4 * 4, 2 * 4 * 4 + 4 * 4
        both = sum(part.flops for part in alone.values()) - norm
        assert cost(mix, max_len).flops == both + gate
        held = sum(part.state_bytes for part in alone.values())
        assert cost(mix, max_len).state_bytes == held
