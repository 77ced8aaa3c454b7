"""Work of state space layers, by formula and as the compiler counts it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.quick import filled

from capibara_eqx.layers import S5, LinearSSM, Mamba3
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


def mamba3_flops(**options):
    """Those of one step of one block, as the compiler counts them and by formula."""
    # The loop over tokens, which takes each operation once; before the compiler fuses,
    # which repeats some.
    options = {"d_state": 8, "head_dim": 16, "implementation": "reference", **options}
    layer = of_shape(Mamba3, 64, **options)
    step = eqx.filter_jit(lambda m, x, c: m.step(x, c))
    lowered = step.lower(layer, jnp.zeros(64), layer.init_cache()).lowered
    model = of_shape(LanguageModel, 2, 64, [ResidualBlock(layer, 64)])
    return lowered.cost_analysis()["flops"], model_cost(model)[1].flops - 4 * 64


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        # Two pairs turn, as before.
        ({"d_state": 16, "rope_fraction": 0.25}, 0),
        # 128 channels more: a SiLU is four, and a sum of n terms is n - 1.
        ({"expand": 4, "head_dim": 32}, 128 * (4 - 1)),
        # Two norms: a quotient and eps, less an addition.
        ({"n_groups": 2}, 2 * (2 - 1)),
        # Eight of them.
        ({"output_norm": True}, 8 * (2 - 1)),
    ],
    ids=str,
)
def test_more_of_something_in_mamba3(change, left_out):
    (counted, ours), (base_counted, base_ours) = mamba3_flops(**change), mamba3_flops()
    assert ours > base_ours
    assert counted - base_counted == ours - base_ours + left_out


def test_angles_of_mamba3():
    """By hand: the compiler counts a product of complex numbers as one operation."""
    (_, some), (_, all_turn) = mamba3_flops(), mamba3_flops(rope_fraction=1.0)
    product = 4 + 2
    angle = 1 + 2 + product  # times the step; cosine and sine; the turn so far
    assert all_turn - some == 2 * (2 * 64 + 8 * (angle + 2 * product))


def test_what_the_formula_of_mamba3_leaves_out_is_small():
    counted, ours = mamba3_flops()
    assert ours < counted < 1.05 * ours
