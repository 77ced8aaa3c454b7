"""A stack of N:M transformer blocks against float64 NumPy."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.attention_oracle import affine, attention_row, rms_norm
from support.expert_oracle import ACTIVATIONS
from support.messages import refused
from support.numpy_oracles import wide
from support.quick import built
from support.sparsity_oracle import nm_mask
from support.tolerances import assert_close

from capibara_eqx.arrays import FakeQuantArray, SparseArray
from capibara_eqx.layers import Linear, SparseCapibara
from capibara_eqx.models import LanguageModel, ResidualBlock, model_cost
from capibara_eqx.transforms import convert, dequantize, report, sr_ste


KEY = jax.random.key(0)


@functools.cache
def layer_of(dynamic, pattern="2:4", layers=2):
    return built(SparseCapibara, 8, layers, pattern, dynamic, 2, 12, key=KEY)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def linears(model):
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Linear))
    return [leaf for leaf in leaves if isinstance(leaf, Linear)]


def expected(layer, x, n, m):
    """One document, the zeros of dynamic weights chosen by a loop."""

    def dense(leaf):
        if not isinstance(leaf, Linear):
            return leaf
        weight: Any = leaf.weight
        if isinstance(weight, FakeQuantArray):
            values = wide(weight.weight)
            weight = np.where(nm_mask(values, n, m), values, 0)
        else:
            weight = wide(weight.dense())
        return eqx.tree_at(lambda node: node.weight, leaf, weight)

    y = wide(x)
    for block in layer.blocks:
        block = jax.tree.map(dense, block, is_leaf=lambda v: isinstance(v, Linear))
        norms = (block.mixer_norm, block.feed_forward_norm)
        first, second = (wide(norm.weight) for norm in norms)
        y = y + attention_row(block.mixer, rms_norm(y, first, norms[0].eps))
        up, down = block.feed_forward.up_proj, block.feed_forward.down_proj
        hidden = ACTIVATIONS["gelu"](affine(up, rms_norm(y, second, norms[1].eps)))
        y = y + affine(down, hidden)
    return y


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs(dynamic):
    layer = layer_of(dynamic)
    x = random((5, 8))
    want = expected(layer, x, 2, 4)
    got = eqx.filter_jit(layer)(x)
    # Some 20 sums of at most 12 terms, one behind the other.
    assert_close(got, want, dtype="float32", length=12 * 20)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.75)])
def test_sparsity_is_exact(dynamic, pattern, share):
    layer = layer_of(dynamic, pattern)
    kind = FakeQuantArray if dynamic else SparseArray
    assert all(isinstance(m.weight, kind) for m in linears(layer))
    weights = layer.get_weights()
    assert weights.shape == (2 * (4 * 8 * 8 + 2 * 8 * 12),)
    assert int((weights == 0).sum()) == share * weights.size
    groups = np.asarray(weights != 0).reshape(-1, 4).sum(axis=1)
    assert (groups == int(pattern[0])).all()


def test_all_of_a_group_is_the_dense_layer():
    sparse, dynamic = layer_of(False, "4:4"), layer_of(True, "4:4")
    x = random((5, 8))
    want = eqx.filter_jit(dequantize(dynamic))(x)
    for layer in (sparse, dynamic):
        assert_close(eqx.filter_jit(layer)(x), want, dtype="float32", length=240)
    assert not (sparse.get_weights() == 0).any()


def trained(layer, optimizer, x, target):
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def loss(params):
        return jnp.mean(jnp.square(eqx.combine(params, static)(x) - target))

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params)
            # optax divides numbers by counts of steps.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), value

        carry = params, optimizer.init(params)
        (params, _), losses = jax.lax.scan(step, carry, None, length=40)
        return params, losses

    params, losses = run(params)
    return eqx.combine(params, static), losses


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_sparsity_is_exact_after_training_too(dynamic):
    layer = layer_of(dynamic, layers=1)
    x, target = random((4, 5, 8)), random((4, 5, 8), 1)
    adam = optax.adam(0.02)
    optimizer = optax.chain(sr_ste(), adam) if dynamic else adam
    after, losses = trained(layer, optimizer, x, target)
    assert losses[-1] < 0.5 * losses[0]
    before, weights = layer.get_weights() != 0, after.get_weights() != 0
    assert float(weights.mean()) == 0.5
    assert bool((before == weights).all()) != dynamic
    if dynamic:
        fixed = convert(after)
        np.testing.assert_array_equal(fixed.get_weights(), after.get_weights())
        # Rows of 8 and of 12: half of the values, and two bits for each place.
        rows = (4 * 8 + 12) * (4 * 4 + 1) + 8 * (6 * 4 + 2)
        assert sum(entry.nbytes for entry in report(fixed).entries) == rows


def test_work_in_a_model_is_that_of_its_parts():
    blocks = [ResidualBlock(layer_of(False, layers=1), 8)]
    model = LanguageModel(7, 8, blocks, key=KEY)
    rows = {row.name: row for row in model_cost(model, max_len=3)}
    maps = 2 * (4 * 8 * 8 + 2 * 8 * 12)
    attention = 2 * 3 * (2 * 4 + 2 * 4 + 5)
    assert rows["block 0"].flops == maps + attention + 3 * 4 * 8


@pytest.mark.errors
def test_refusals():
    sizes: dict[str, Any] = {"d_model": 8, "num_layers": 1, "n_heads": 2}

    def make(pattern, **changes):
        return SparseCapibara(sparsity_pattern=pattern, key=KEY, **(sizes | changes))

    for pattern in ("2/4", "2:4:8", "", ":4", "-1:4", 2):
        with refused("`sparsity_pattern`", '"2:4"'):
            make(pattern)
    with refused("`n`", "4 of 2"):
        make("4:2")
    with refused("`d_model`", "multiple", "5", "8"):
        make("1:5")
    with refused("`d_ff`", "multiple", "6"):
        make("2:4", d_ff=6)
    for name in ("num_layers", "d_model", "d_ff"):
        with refused(f"`{name}`"):
            make("2:4", **{name: 0})
    layer = make("2:4")
    with refused("SparseCapibara", "`x`", "8 elements"):
        layer(jnp.zeros((3, 4)))
    with refused("SparseCapibara", "`segment_ids`"):
        layer(jnp.zeros((3, 8)), segment_ids=jnp.zeros((4,), "int32"))
    with refused("SparseCapibara", "`cache`", "1 blocks"):
        layer.step(jnp.zeros((8,)), layer.init_cache(max_len=3) * 2)
