"""Work of layers of fast weights, by formula and as the compiler counts it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.quick import filled

from capibara_eqx.layers import DeltaNet, MesaNet, MetaLinearAttention, TTTLinear
from capibara_eqx.models import LanguageModel, ResidualBlock, model_cost


pytestmark = pytest.mark.slow
# The work is that of the shapes, whatever the numbers are.
of_shape = functools.partial(filled, seed=0, size=1.0)
LAYERS = {
    "delta": of_shape(DeltaNet, 64, 4),
    "delta_gated": of_shape(
        DeltaNet,
        *(64, 2, 16, 48),
        gated=True,
        output_gate=True,
        use_short_conv=False,
    ),
    "meta": of_shape(MetaLinearAttention, 64, 4),
    # The compiler counts the steps of a loop as one, and no calls of C++.
    "mesa": of_shape(MesaNet, 64, 4, cg_steps=1, implementation="xla"),
    "mesa_gated": of_shape(
        *(MesaNet, 64, 2), cg_steps=1, gate=True, implementation="xla"
    ),
}
TTT = {
    "ttt": of_shape(TTTLinear, 64, 4),
    "ttt_wide": of_shape(TTTLinear, 128, 1, mini_batch_size=5),
    "ttt_bare": of_shape(TTTLinear, 64, 2, output_norm=False, gate=False),
    "ttt_unit": of_shape(TTTLinear, 64, 4, mini_batch_size=64, qk_norm=True),
}


def block_cost(layer):
    """That of a block with it, and its work without the norm."""
    d_model = layer.d_model
    model = of_shape(LanguageModel, 2, d_model, [ResidualBlock(layer, d_model)])
    _, block, *_ = model_cost(model)
    return block, block.flops - 4 * d_model


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_nearly_all_of_the_work(name):
    layer = LAYERS[name]
    block, ours = block_cost(layer)
    step = eqx.filter_jit(lambda m, x, c: m.step(x, c))
    # Before the compiler fuses, which repeats some.
    lowered = step.lower(layer, jnp.zeros(64), layer.init_cache()).lowered
    assert 0.95 * ours < lowered.cost_analysis()["flops"] < 1.1 * ours
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.init_cache()))
    assert block.state_bytes == held


@pytest.mark.parametrize("name", TTT)
def test_a_mini_batch_is_what_its_tokens_share(name):
    layer = TTT[name]
    block, ours = block_cost(layer)
    length, d = layer.mini_batch_size, layer.head_dim
    call = eqx.filter_jit(lambda m, x: m(x))
    lowered = call.lower(layer, jnp.zeros((length, layer.d_model))).lowered
    # What the weights become is read by no one here, and is not made.
    unread = layer.n_heads * d * (d + 1) * (2 + 2 / length)
    counted = lowered.cost_analysis()["flops"] / length + unread
    assert 0.98 * ours < counted < 1.17 * ours
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.init_cache()))
    assert block.state_bytes == held


def test_every_step_of_the_solver_costs_the_same():
    works = [
        block_cost(of_shape(MesaNet, 64, 4, cg_steps=steps))[1] for steps in (1, 2, 5)
    ]
    assert works[1] - works[0] == 4 * (2 * 16 * 16 + 12 * 16)
    assert works[2] - works[0] == 4 * (works[1] - works[0])


def test_a_factor_costs_a_third_of_a_cube():
    small, large = (
        block_cost(of_shape(MesaNet, d, 1, solver="cholesky"))[1] for d in (30, 60)
    )
    layer_maps = lambda d: 2 * (4 * d * d + 2 * d) + 2 * 2 * d * 4
    sums, solve = (lambda d: 8 * d * d), (lambda d: d**3 // 3 + 2 * d * d)
    channels = lambda d: 13 * d
    total = lambda d: layer_maps(d) + sums(d) + solve(d) + channels(d)
    assert large - small == total(60) - total(30)
