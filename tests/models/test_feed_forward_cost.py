"""Work of feed-forward layers, by formula and as the compiler counts it."""

import functools

import equinox as eqx
import jax.numpy as jnp
import pytest
from support.quick import filled

from capibara_eqx.layers import GLU, MLP, Mamba, MixtureOfRookies, MoE, SwiGLU
from capibara_eqx.models import LanguageModel, TransformerBlock, model_cost


# The work is that of the shapes, whatever the numbers are.
of_shape = functools.partial(filled, seed=0, size=1.0)


def by_formula(layer):
    """What a model with the layer in its block costs more than one with a small MLP."""
    smallest = of_shape(MLP, 64, 1, use_bias=False)
    mixer = of_shape(Mamba, 64, 1)
    models = [
        of_shape(LanguageModel, 2, 64, [TransformerBlock(mixer, part, 64)])
        for part in (layer, smallest)
    ]
    costs = [model_cost(model)[-1].flops for model in models]
    return costs[0] - costs[1] + 2 * 2 * 64


def by_compiler(layer):
    compiled = eqx.filter_jit(layer).lower(jnp.zeros((1, 64))).compile()
    return compiled.compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    "layer",
    [
        of_shape(GLU, 64, 100, "reglu"),
        of_shape(SwiGLU, 64, 100),
        of_shape(MLP, 64, 100, "relu"),
        # Every expert is chosen, and computed.
        of_shape(MoE, 64, 4, 4, 30, shared_d_ff=50, implementation="dense"),
        of_shape(MixtureOfRookies, 64, 4, 30, 4, "relu", implementation="dense"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_products_are_nearly_all_of_the_work(layer):
    ours, counted = by_formula(layer), by_compiler(layer)
    assert ours < counted < 1.1 * ours


def test_experts_that_are_not_chosen_cost_nothing():
    router, expert, shared = 2 * 64 * 8, 3 * 2 * 64 * 30, 3 * 2 * 64 * 50
    for top_k in (1, 3):
        layer = of_shape(MoE, 64, 8, top_k, 30)
        assert by_formula(layer) == router + top_k * expert
    layer = of_shape(MoE, 64, 8, 2, 30, shared_d_ff=50)
    assert by_formula(layer) == router + 2 * expert + shared


def test_of_product_keys_all_are_read_and_their_experts_are_not():
    experts, query, keys = (
        2 * 3 * 2 * 2 * 64 * 5,
        2 * 64 * 2 * 2 * 32,
        2 * 2 * 2 * 7 * 32,
    )
    options = {"routing": "product_key", "n_heads": 2}
    layer = of_shape(MixtureOfRookies, 64, 49, 5, 3, **options)
    assert by_formula(layer) == experts + query + keys
    layer = of_shape(MixtureOfRookies, 64, 49, 5, 3, query_norm=True, **options)
    assert by_formula(layer) == experts + query + keys + 2 * 4 * 64
    layer = of_shape(MixtureOfRookies, 64, 49, 5, 3)
    assert by_formula(layer) == 2 * 64 * 49 + experts // 2
