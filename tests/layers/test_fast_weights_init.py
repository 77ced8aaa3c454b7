"""How layers of fast weights start, that arguments count, and what is refused."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.layer_arguments import describe, differ
from support.messages import refused
from support.numpy_oracles import softplus

from capibara_eqx.layers import (
    DeltaNet,
    MetaLinearAttention,
    delta_rule,
    weight_decay_mask,
)


# The keys are fixed, so that a distribution test gives the same answer every time.
LEVEL = 1e-3
KEY = jax.random.key(0)


@pytest.mark.slow
def test_decays_of_a_gated_memory_start_as_those_of_mamba2():
    layer = DeltaNet(4, 512, 1, gated=True, key=KEY)
    A = np.exp(np.asarray(layer.A_log, "float64"))
    dt = np.log(softplus(np.asarray(layer.dt_bias, "float64")))
    assert stats.kstest(A, "uniform", (1, 15)).pvalue > LEVEL
    low, high = np.log(1e-3), np.log(0.1)
    assert stats.kstest(dt, "uniform", (low, high - low)).pvalue > LEVEL


@pytest.mark.slow
def test_meta_linear_attention_starts_as_in_the_authors_program():
    layer = MetaLinearAttention(64, 4, key=KEY)
    assert (layer.head_dim, layer.v_head_dim, layer.temperature) == (8, 16, 16.0)
    np.testing.assert_array_equal(layer.augmentation, np.zeros((4, 8)))
    limit = 2**-2.5 * np.sqrt(6 / (64 + 32))
    for linear in (layer.q_proj, layer.decay_proj):
        weight = np.asarray(linear.weight, "float64").ravel()
        uniform = stats.kstest(weight, "uniform", (-limit, 2 * limit))
        assert uniform.pvalue > LEVEL
    assert layer.norm.weight is None
    assert layer.norm.bias is None


@pytest.mark.slow
def test_narrow_parameters_leave_the_memory_wide():
    narrow = {"dtype": jnp.bfloat16, "key": KEY}
    layer = DeltaNet(4, 2, gated=True, output_gate=True, **narrow)
    wide = {".A_log", ".dt_bias"}
    for path, leaf in jax.tree.leaves_with_path(eqx.filter(layer, eqx.is_array)):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if name in wide else jnp.bfloat16), name
    assert layer.init_cache().state.dtype == jnp.float32
    meta = MetaLinearAttention(4, 2, **narrow)
    leaves = jax.tree.leaves(eqx.filter(meta, eqx.is_array))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert meta.init_cache().state.dtype == jnp.float32


@pytest.mark.slow
def test_what_weight_decay_leaves_alone():
    layer = DeltaNet(4, 2, gated=True, output_gate=True, conv_bias=True, key=KEY)
    meta = MetaLinearAttention(4, 2, key=KEY)
    for built, kept in (
        (layer, {".A_log", ".dt_bias", ".conv.bias", ".norm.weight"}),
        (meta, {".augmentation", ".gate_proj.bias"}),
    ):
        mask = jax.tree.leaves_with_path(weight_decay_mask(built))
        found = {jax.tree_util.keystr(path) for path, decays in mask if not decays}
        assert found == kept


DEFAULTS: dict[Any, dict[str, Any]] = {
    DeltaNet: {"d_model": 4, "n_heads": 2},
    MetaLinearAttention: {"d_model": 4, "n_heads": 2},
}
OTHERS: dict[Any, dict[str, Any]] = {
    DeltaNet: {
        "d_model": 6,
        "n_heads": 1,
        "head_dim": 3,
        "v_head_dim": 3,
        "use_short_conv": False,
        "d_conv": 3,
        "conv_bias": True,
        "negative_eigenvalues": True,
        "gated": True,
        "output_gate": True,
        "norm_eps": 0.1,
        "dtype": jnp.bfloat16,
        "key": jax.random.key(1),
    },
    MetaLinearAttention: {
        "d_model": 8,
        "n_heads": 1,
        "head_dim": 3,
        "v_head_dim": 3,
        "d_conv": 3,
        "temperature": 1.0,
        "norm_eps": 0.1,
        "dtype": jnp.bfloat16,
        "key": jax.random.key(1),
    },
}
# They change the program, not what comes out.
PROGRAMS: dict[str, Any] = {"chunk_size": 2, "implementation": "reference"}


@pytest.mark.parametrize("layer", OTHERS)
def test_every_argument_is_tested(layer):
    names = list(inspect.signature(layer).parameters)
    assert sorted(names) == sorted([*OTHERS[layer], *PROGRAMS])


@pytest.mark.slow
@pytest.mark.parametrize("layer", OTHERS)
def test_every_argument_changes_the_layer(layer):
    before = describe(layer(**DEFAULTS[layer], key=KEY))
    for name, value in OTHERS[layer].items():
        arguments = {**DEFAULTS[layer], "key": KEY, name: value}
        assert differ(describe(layer(**arguments)), before), name


@pytest.mark.slow
@pytest.mark.parametrize("layer", OTHERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_arguments_of_the_program_reach_it(layer, name):
    def program(**options):
        built = layer(**DEFAULTS[layer], **options, key=KEY)
        return str(jax.make_jaxpr(lambda x: built(x))(jnp.zeros((7, 4))))

    assert program() != program(**{name: PROGRAMS[name]})


BOTH = [
    ({"d_model": 0}, ("`d_model`", "positive", "0")),
    ({"n_heads": -1}, ("`n_heads`", "positive", "-1")),
    ({"head_dim": 0}, ("`head_dim`", "positive", "0")),
    ({"v_head_dim": 1.5}, ("`v_head_dim`", "positive", "1.5")),
    ({"d_conv": 0}, ("`d_conv`", "positive", "0")),
    ({"norm_eps": 0.0}, ("`norm_eps`", "positive", "0.0")),
    ({"chunk_size": 0}, ("`chunk_size`", "positive", "0")),
    ({"implementation": "xlaa"}, ("implementation", "'xlaa'")),
    ({"n_heads": 3}, ("`head_dim`", "d_model=4", "multiple", "Pass")),
]
DELTA = [
    ({"gated": 1}, ("`gated`", "True or False", "1")),
    ({"output_gate": "silu"}, ("`output_gate`", "True or False", "silu")),
    ({"use_short_conv": None}, ("`use_short_conv`", "True or False", "None")),
    ({"conv_bias": 0}, ("`conv_bias`", "True or False", "0")),
    ({"negative_eigenvalues": 2}, ("`negative_eigenvalues`", "True or False", "2")),
]
META = [
    ({"temperature": 0.0}, ("`temperature`", "positive", "0.0")),
    ({"n_heads": 4}, ("`head_dim`", "multiple of 8", "Pass")),
    ({"n_heads": 3, "head_dim": 1}, ("`v_head_dim`", "multiple of 3", "Pass")),
]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("layer", "arguments", "words"),
    [
        *((layer, *bad) for layer in OTHERS for bad in BOTH),
        *((DeltaNet, *bad) for bad in DELTA),
        *((MetaLinearAttention, *bad) for bad in META),
    ],
)
def test_arguments_that_do_not_fit(layer, arguments, words):
    with refused(*words):
        layer(**{**DEFAULTS[layer], "key": KEY, **arguments})


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": zeros(7, 3)}, ("`k`", "(*batch, seq, n_heads, head_dim)", "(7, 3)")),
        ({"k": zeros(5, 0, 2, 3)}, ("`k`", "zero-length", "at least one")),
        ({"q": zeros(5, 7, 2, 4)}, ("`q`", "shape of `k`", "(5, 7, 2, 4)")),
        ({"v": zeros(5, 7, 1, 4)}, ("`v`", "heads of `k`", "(5, 7, 1, 4)")),
        ({"v": zeros(5, 7, 2)}, ("`v`", "v_head_dim", "(5, 7, 2)")),
        ({"beta": zeros(5, 7, 3)}, ("`beta`", "(5, 7, 2)", "(5, 7, 3)")),
        ({"log_decay": zeros(5, 7)}, ("`log_decay`", "(5, 7, 2)", "(5, 7)")),
        ({"initial_state": zeros(5, 2, 3, 4)}, ("`initial_state`", "(5, 2, 4, 3)")),
        ({"reset": zeros(7, dtype="bool")}, ("`reset`", "(5, 7)", "(7,)")),
        ({"reset": zeros(5, 7)}, ("`reset`", "boolean", "float32", "!= 0")),
        ({"chunk_size": -1}, ("`chunk_size`", "positive", "-1")),
    ],
)
def test_what_the_delta_rule_refuses(changed, words):
    fits = {
        "q": zeros(5, 7, 2, 3),
        "k": zeros(5, 7, 2, 3),
        "v": zeros(5, 7, 2, 4),
        "beta": zeros(5, 7, 2),
    }
    with refused("chunk_size" if "chunk_size" in changed else "delta_rule", *words):
        delta_rule(**fits | changed)
