"""How a Mamba-3 layer starts, that its arguments count, and what it refuses."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.layer_arguments import describe, differ
from support.messages import refused
from support.numpy_oracles import softplus

from capibara_eqx.layers import Mamba3


# The keys are fixed, so that a distribution test gives the same answer every time.
LEVEL = 1e-3


@pytest.fixture(scope="module")
def wide_layer():
    """Enough heads for statistics."""
    return Mamba3(256, 2, head_dim=1, rope_fraction=1.0, key=jax.random.key(0))


def test_step_sizes_are_log_uniform(wide_layer):
    dt = softplus(np.asarray(wide_layer.dt_bias, "float64"))
    assert dt.min() >= 1e-3 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    low, high = math.log(1e-3), math.log(0.1)
    assert stats.kstest(np.log(dt), "uniform", (low, high - low)).pvalue > LEVEL
    # The test can tell: they are not uniform themselves.
    assert stats.kstest(dt, "uniform", (1e-3, 0.1 - 1e-3)).pvalue < LEVEL


def test_the_rest_starts_at_one(wide_layer):
    np.testing.assert_array_equal(wide_layer.D, np.ones(512))
    for weight in (wide_layer.B_norm.weight, wide_layer.C_norm.weight):
        np.testing.assert_array_equal(weight, np.ones(2))
    for bias in (wide_layer.B_bias, wide_layer.C_bias):
        np.testing.assert_array_equal(bias, np.ones((512, 2)))
    cache = wide_layer.init_cache((3,))
    np.testing.assert_array_equal(cache.turn[..., 0], np.ones((3, 512, 1)))
    np.testing.assert_array_equal(cache.turn[..., 1], np.zeros((3, 512, 1)))


def test_a_norm_of_each_head_is_there_if_asked_for():
    without, layer = (
        Mamba3(4, 2, 2, 4, rope_fraction=1.0, output_norm=norm, key=jax.random.key(0))
        for norm in (False, True)
    )
    assert without.norm is None
    assert layer.norm is not None
    assert layer.norm.groups == layer.n_heads == 2


@pytest.mark.parametrize(
    ("d_state", "fraction", "angles"),
    [
        (4, 0.5, 1),
        (5, 1.0, 2),
        (7, 0.9, 3),
        (7, 0.5, 1),
        (128, 0.5, 32),
        (100, 0.58, 29),
    ],
)
def test_pairs_that_turn(d_state, fraction, angles):
    layer = Mamba3(
        2, d_state, head_dim=4, rope_fraction=fraction, key=jax.random.key(0)
    )
    assert layer.angles == angles
    assert layer.init_cache().turn.shape == (1, angles, 2)


def test_narrow_parameters_leave_the_recurrence_wide():
    layer = Mamba3(
        4, 4, head_dim=4, output_norm=True, dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    narrow = (layer.in_proj, layer.B_norm, layer.C_norm, layer.norm, layer.out_proj)
    weights = jax.tree.leaves(narrow)
    assert len(weights) == 5
    assert {weight.dtype for weight in weights} == {jnp.dtype(jnp.bfloat16)}
    wide = (layer.D, layer.dt_bias, layer.B_bias, layer.C_bias)
    cache = layer.init_cache()
    states = jax.tree.leaves((wide, cache.state, cache.turn, cache.last))
    assert {state.dtype for state in states} == {jnp.dtype(jnp.float32)}


DEFAULTS: dict[str, Any] = {"d_model": 4, "d_state": 4, "head_dim": 4}
OTHERS: dict[str, Any] = {
    "d_model": 6,
    "d_state": 5,
    "expand": 3,
    "head_dim": 2,
    "n_groups": 2,
    "rope_fraction": 1.0,
    "dt_min": 0.05,
    "dt_max": 1.0,
    "dt_init_floor": 0.09,
    "A_floor": 3.0,
    "output_norm": True,
    "norm_eps": 0.1,
    "dtype": jnp.bfloat16,
    "key": jax.random.key(1),
}
# They change the program, not what comes out.
PROGRAMS: dict[str, Any] = {"chunk_size": 2, "implementation": "reference"}


def test_every_argument_is_tested():
    names = list(inspect.signature(Mamba3).parameters)
    assert sorted(names) == sorted([*OTHERS, *PROGRAMS])


@pytest.fixture(scope="module")
def default_description():
    return describe(Mamba3(**DEFAULTS, key=jax.random.key(0)))


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_changes_the_layer(name, default_description):
    arguments = {**DEFAULTS, "key": jax.random.key(0), name: OTHERS[name]}
    assert differ(describe(Mamba3(**arguments)), default_description)


@pytest.mark.parametrize("name", PROGRAMS)
def test_arguments_of_the_kernel_reach_it(name):
    def program(**options):
        layer = Mamba3(**DEFAULTS, **options, key=jax.random.key(0))
        return str(jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((7, 4))))

    assert program() != program(**{name: PROGRAMS[name]})


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"d_model": 0}, ("`d_model`", "positive", "0")),
        ({"d_state": -1}, ("`d_state`", "positive", "-1")),
        ({"d_state": 1}, ("`d_state`", "2 or more", "got 1", "pairs")),
        ({"expand": 1.5}, ("`expand`", "positive", "1.5")),
        ({"head_dim": 3}, ("`head_dim`", "divide", "8", "3")),
        ({"n_groups": 3}, ("`n_groups`", "divide", "2 heads", "3")),
        ({"rope_fraction": 0.0}, ("`rope_fraction`", "positive", "0.0", "at 1")),
        ({"rope_fraction": 1.5}, ("`rope_fraction`", "at most 1", "1.5", "at 1")),
        ({"rope_fraction": math.nan}, ("`rope_fraction`", "finite", "nan")),
        ({"rope_fraction": "half"}, ("`rope_fraction`", "number", "'half'")),
        ({"rope_fraction": 0.4}, ("`rope_fraction`", "pair", "2/4", "0.4")),
        ({"A_floor": 0.0}, ("`A_floor`", "positive", "0.0")),
        ({"A_floor": math.inf}, ("`A_floor`", "finite", "inf")),
        ({"norm_eps": 0.0}, ("`norm_eps`", "positive", "0.0")),
        ({"dt_min": 1.0}, ("`dt_min`", "`dt_max`", "swapped")),
        ({"dt_init_floor": -1.0}, ("`dt_init_floor`", "-1.0")),
        ({"chunk_size": 0}, ("`chunk_size`", "positive", "0")),
        ({"implementation": "xlaa"}, ("implementation", "'xlaa'")),
        ({"implementation": "pallas_tpu"}, ("implementation", "'pallas_tpu'", "ssd")),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, words):
    with refused(*words):
        Mamba3(**{**DEFAULTS, "key": jax.random.key(0), **arguments})


@pytest.mark.errors
def test_inputs_that_do_not_fit():
    layer = Mamba3(**DEFAULTS, key=jax.random.key(0))
    with refused("Mamba3", "`x`", "4 elements", "(7, 5)"):
        layer(jnp.zeros((7, 5)))
    with refused("Mamba3", "`x`", "sequence", "step"):
        layer(jnp.zeros(4))
    with refused("Mamba3.step", "`x`", "4 elements", "(5,)"):
        layer.step(jnp.zeros(5), layer.init_cache())
    with refused("Mamba3", "`segment_ids`", "(7,)"):
        layer(jnp.zeros((7, 4)), segment_ids=jnp.zeros(6, int))
    with refused("Mamba3", "cache", "init_cache"):
        layer.prefill(jnp.zeros((2, 7, 4)), layer.init_cache((3,)))
