"""Work of layers of fast weights, by formula and as the compiler counts it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.quick import filled

from capibara_eqx.layers import DeltaNet, MetaLinearAttention
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
}


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_nearly_all_of_the_work(name):
    layer = LAYERS[name]
    model = of_shape(LanguageModel, 2, 64, [ResidualBlock(layer, 64)])
    _, block, *_ = model_cost(model)
    ours = block.flops - 4 * 64  # the norm
    step = eqx.filter_jit(lambda m, x, c: m.step(x, c))
    # Before the compiler fuses, which repeats some.
    lowered = step.lower(layer, jnp.zeros(64), layer.init_cache()).lowered
    assert 0.95 * ours < lowered.cost_analysis()["flops"] < 1.1 * ours
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.init_cache()))
    assert block.state_bytes == held
