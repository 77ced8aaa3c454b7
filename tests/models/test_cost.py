import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from capibara_eqx.models import mamba_language_model, model_cost


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_state_are_those_of_the_arrays(scan, tied):
    model = mamba_language_model(
        32, 16, 3, scan=scan, tie_embeddings=tied, key=jax.random.key(0)
    )
    total = model_cost(model)[-1]
    parameters = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert total.parameters == sum(leaf.size for leaf in parameters)
    assert total.parameter_bytes == sum(leaf.nbytes for leaf in parameters)
    cache = jax.tree.leaves(model.init_cache(()))
    assert total.state_bytes == sum(leaf.nbytes for leaf in cache)


def test_scanned_and_listed_cost_the_same():
    models = [
        mamba_language_model(32, 16, 3, scan=scan, key=jax.random.key(0))
        for scan in (False, True)
    ]
    listed, scanned = (model_cost(model)[-1] for model in models)
    assert listed == scanned


def test_flops_agree_with_the_compiler_where_it_counts_right():
    # One token: no loop runs more than once, so XLA's count of a step is complete.
    model = mamba_language_model(64, 64, 2, d_state=8, key=jax.random.key(0))
    cache = model.init_cache(())
    step = eqx.filter_jit(lambda m, t, c: m.step(t, c))
    compiled = step.lower(model, jnp.asarray(3, jnp.int32), cache).compile()
    analysis = compiled.compiled.cost_analysis()
    counted = analysis["flops"] + analysis.get("transcendentals", 0.0)
    # The rest of a step is elementwise (activations, adds of biases and residuals):
    # about 7 % at this width, less at larger ones.
    assert counted == pytest.approx(model_cost(model)[-1].flops, rel=0.1)


@pytest.mark.errors
def test_unknown_layer():
    model = mamba_language_model(32, 16, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.stack.blocks[0].mixer, model, eqx.nn.Identity())
    with pytest.raises(ValueError, match="Identity is not known"):
        model_cost(model)
