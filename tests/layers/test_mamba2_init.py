"""How a Mamba-2 layer starts, that its arguments count, and what it refuses."""

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

from capibara_eqx.layers import GatedRMSNorm, Mamba2


# The keys are fixed, so that a distribution test gives the same answer every time.
LEVEL = 1e-3


@pytest.fixture(scope="module")
def wide_layer():
    """Enough heads for statistics."""
    return Mamba2(256, 2, head_dim=1, key=jax.random.key(0))


def test_decay_rates_are_uniform(wide_layer):
    A = np.exp(np.asarray(wide_layer.A_log, "float64"))
    assert A.min() >= 1 - 1e-6
    assert A.max() <= 16 + 1e-5
    assert stats.kstest(A, "uniform", (1, 15)).pvalue > LEVEL
    # The test can tell: their logarithms are not uniform.
    assert stats.kstest(np.log(A) / np.log(16), "uniform").pvalue < LEVEL
    np.testing.assert_array_equal(wide_layer.D, np.ones(512))


def test_step_sizes_are_log_uniform(wide_layer):
    dt = softplus(np.asarray(wide_layer.dt_bias, "float64"))
    assert dt.min() >= 1e-3 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    low, high = math.log(1e-3), math.log(0.1)
    assert stats.kstest(np.log(dt), "uniform", (low, high - low)).pvalue > LEVEL


def test_narrow_parameters_leave_the_recurrence_wide():
    layer = Mamba2(4, 2, head_dim=4, dtype=jnp.bfloat16, key=jax.random.key(0))
    for narrow in (layer.in_proj, layer.conv, layer.norm, layer.out_proj):
        assert narrow.weight.dtype == jnp.bfloat16
    for wide in (layer.A_log, layer.D, layer.dt_bias, layer.init_cache().state):
        assert wide.dtype == jnp.float32


DEFAULTS: dict[str, Any] = {"d_model": 4, "d_state": 4, "head_dim": 4}
OTHERS: dict[str, Any] = {
    "d_model": 6,
    "d_state": 3,
    "d_conv": 3,
    "expand": 3,
    "head_dim": 2,
    "n_groups": 2,
    "dt_min": 0.05,
    "dt_max": 1.0,
    "dt_init_floor": 0.09,
    "dt_limit": (0.5, 0.6),
    "A_init_range": (20.0, 30.0),
    "norm_before_gate": True,
    "norm_eps": 0.1,
    "bias": True,
    "conv_bias": False,
    "activation": "relu",
    "dtype": jnp.bfloat16,
    "key": jax.random.key(1),
}
# They change the program, not what comes out.
PROGRAMS: dict[str, Any] = {"chunk_size": 2, "implementation": "reference"}


def test_every_argument_is_tested():
    names = list(inspect.signature(Mamba2).parameters)
    assert sorted(names) == sorted([*OTHERS, *PROGRAMS])


@pytest.fixture(scope="module")
def default_description():
    return describe(Mamba2(**DEFAULTS, key=jax.random.key(0)))


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_changes_the_layer(name, default_description):
    arguments = {**DEFAULTS, "key": jax.random.key(0), name: OTHERS[name]}
    assert differ(describe(Mamba2(**arguments)), default_description)


@pytest.mark.parametrize("name", PROGRAMS)
def test_arguments_of_the_kernel_reach_it(name):
    def program(**options):
        layer = Mamba2(**DEFAULTS, **options, key=jax.random.key(0))
        return str(jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((7, 4))))

    assert program() != program(**{name: PROGRAMS[name]})


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"d_model": 0}, ("`d_model`", "positive", "0")),
        ({"d_state": -1}, ("`d_state`", "positive", "-1")),
        ({"d_conv": 0}, ("`d_conv`", "positive", "0")),
        ({"expand": 1.5}, ("`expand`", "positive", "1.5")),
        ({"head_dim": 3}, ("`head_dim`", "divide", "8", "3")),
        ({"n_groups": 3}, ("`n_groups`", "divide", "2 heads", "3")),
        ({"norm_eps": 0.0}, ("`norm_eps`", "positive", "0.0")),
        ({"dt_min": 1.0}, ("`dt_min`", "`dt_max`", "swapped")),
        ({"dt_init_floor": -1.0}, ("`dt_init_floor`", "-1.0")),
        ({"dt_limit": (0.2, 0.1)}, ("`dt_limit`", "0.2", "0.1")),
        ({"dt_limit": 0.1}, ("`dt_limit`", "pair", "0.1")),
        ({"dt_limit": (-1.0, 0.1)}, ("`dt_limit`", "-1.0")),
        ({"A_init_range": (0.0, 1.0)}, ("`A_init_range`", "0.0")),
        ({"A_init_range": (1.0, math.inf)}, ("`A_init_range`", "inf")),
        ({"chunk_size": 0}, ("`chunk_size`", "positive", "0")),
        ({"activation": "sillu"}, ("`activation`", "Did you mean 'silu'")),
        ({"implementation": "xlaa"}, ("implementation", "'xlaa'")),
        ({"implementation": "pallas_tpu"}, ("implementation", "'pallas_tpu'", "ssd")),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, words):
    with refused(*words):
        Mamba2(**{**DEFAULTS, "key": jax.random.key(0), **arguments})


@pytest.mark.errors
def test_inputs_that_do_not_fit():
    layer = Mamba2(**DEFAULTS, key=jax.random.key(0))
    with refused("Mamba2", "`x`", "4 elements", "(7, 5)"):
        layer(jnp.zeros((7, 5)))
    with refused("Mamba2", "`x`", "sequence", "step"):
        layer(jnp.zeros(4))
    with refused("Mamba2", "`segment_ids`", "(7,)"):
        layer(jnp.zeros((7, 4)), segment_ids=jnp.zeros(6, int))
    with refused("Mamba2", "cache", "init_cache"):
        layer.prefill(jnp.zeros((2, 7, 4)), layer.init_cache((3,)))
    with refused("`groups`", "divide", "5", "2"):
        GatedRMSNorm(5, 2)
    for shape in ((2, 3), (4,), (1, 4)):
        with refused("GatedRMSNorm", "`z`", "`x`, (2, 4)", str(shape)):
            GatedRMSNorm(4)(jnp.zeros((2, 4)), jnp.zeros(shape))
