"""Work of state space layers, by formula and as the compiler counts it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.quick import filled

from capibara_eqx.layers import S5, LinearSSM
from capibara_eqx.models import LanguageModel, ResidualBlock, model_cost


# The work is that of the shapes, whatever the numbers are.
of_shape = functools.partial(filled, seed=0, size=1.0)
LAYERS = [
    of_shape(LinearSSM, 64, 64, 48, discretization="bilinear", implementation="xla"),
    of_shape(S5, 64, 512),
]


def by_compiler(layer):
    """What a row of one token more costs: not what is done once a call."""

    def counted(rows):
        x, cache = jnp.zeros((rows, 64)), layer.init_cache((rows,))
        step = eqx.filter_jit(lambda m, x, c: m.step(x, c))
        compiled = step.lower(layer, x, cache).compile()
        return compiled.compiled.cost_analysis()["flops"]

    return counted(3) - counted(2)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_products_are_nearly_all_of_the_work(layer):
    model = of_shape(LanguageModel, 2, 64, [ResidualBlock(layer, 64)])
    _, block, *_ = model_cost(model)
    ours = block.flops - 4 * 64  # the norm
    assert ours < by_compiler(layer) < 1.1 * ours
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.init_cache()))
    assert block.state_bytes == held
