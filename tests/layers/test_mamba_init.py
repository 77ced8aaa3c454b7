"""How a Mamba layer starts, and that every argument of its constructor counts."""

import inspect
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.layer_arguments import describe, differ
from support.numpy_oracles import softplus

from capibara_eqx.kernels import traced_implementations
from capibara_eqx.layers import Mamba


# The keys are fixed, so that a distribution test gives the same answer every time.
LEVEL = 1e-3


@pytest.fixture(scope="module")
def wide_layer():
    """Enough channels for statistics; a rank that is not the automatic one."""
    return Mamba(48, 3, dt_rank=5, expand=12, bias=True, key=jax.random.key(0))


def as_float64(x):
    return np.asarray(x, "float64")


def step_sizes(layer):
    """The step sizes at zero input."""
    return softplus(as_float64(layer.dt_proj.bias))


def uniform_within(values, limit):
    """Whether all values lie in +-limit and look uniform there."""
    values = as_float64(values).ravel()
    assert np.all(np.abs(values) <= limit)
    return stats.kstest(values, "uniform", (-limit, 2 * limit)).pvalue > LEVEL


def test_decay_rates_are_the_first_integers(wide_layer):
    A = -np.exp(as_float64(wide_layer.A_log))
    want = -np.tile(np.arange(1, 4), (48 * 12, 1))
    np.testing.assert_allclose(A, want, rtol=2e-7)
    np.testing.assert_array_equal(wide_layer.D, np.ones(48 * 12))


def test_step_sizes_are_log_uniform(wide_layer):
    dt = step_sizes(wide_layer)
    # softplus and its inverse in float32 are each off by a few spacings.
    assert dt.min() >= 1e-3 * (1 - 1e-5)
    assert dt.max() <= 0.1 * (1 + 1e-5)
    low, high = math.log(1e-3), math.log(0.1)
    test = stats.kstest(np.log(dt), "uniform", (low, high - low))
    assert test.pvalue > LEVEL
    # The test can tell: uniform, not log-uniform, step sizes do not pass.
    linear = np.random.default_rng(0).uniform(1e-3, 0.1, dt.size)
    assert stats.kstest(np.log(linear), "uniform", (low, high - low)).pvalue < LEVEL


def test_range_and_floor_of_the_step_sizes():
    def sizes(**options):
        return step_sizes(Mamba(8, 1, key=jax.random.key(1), **options))

    narrow = sizes(dt_min=0.02, dt_max=0.03)
    assert np.all((narrow >= 0.02 * (1 - 1e-5)) & (narrow <= 0.03 * (1 + 1e-5)))
    np.testing.assert_allclose(sizes(dt_min=0.05, dt_max=0.05), 0.05, rtol=1e-5)
    np.testing.assert_allclose(sizes(dt_min=1e-6, dt_max=1e-5), 1e-4, rtol=1e-4)
    low = sizes(dt_min=1e-6, dt_max=1e-5, dt_init_floor=5e-6)
    assert np.all((low >= 5e-6 * (1 - 1e-3)) & (low <= 1e-5 * (1 + 1e-3)))
    assert len(np.unique(low)) > 1


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_step_size_weights(scale):
    def weights(kind):
        layer = Mamba(
            32, 1, dt_rank=5, dt_init=kind, dt_scale=scale, key=jax.random.key(2)
        )
        return layer.dt_proj.weight

    limit = scale / math.sqrt(5)
    assert uniform_within(weights("random"), limit)
    np.testing.assert_allclose(weights("constant"), limit, rtol=2e-7)


def test_linear_maps_and_convolution_are_uniform(wide_layer):
    d_inner = 48 * 12
    for values, fan_in in [
        (wide_layer.in_proj.weight, 48),
        (wide_layer.in_proj.bias, 48),
        (wide_layer.x_proj.weight, d_inner),
        (wide_layer.out_proj.weight, d_inner),
        (wide_layer.conv.weight, 4),
        (wide_layer.conv.bias, 4),
    ]:
        assert uniform_within(values, 1 / math.sqrt(fan_in))
    assert wide_layer.x_proj.bias is None


def test_no_two_parameters_share_their_random_numbers(wide_layer):
    arrays = [wide_layer.in_proj, wide_layer.x_proj, wide_layer.out_proj]
    arrays = [as_float64(linear.weight).ravel() for linear in arrays]
    arrays += [as_float64(wide_layer.conv.weight).ravel()]
    arrays += [as_float64(wide_layer.dt_proj.weight).ravel()]
    arrays += [step_sizes(wide_layer)]
    for i, left in enumerate(arrays):
        for right in arrays[:i]:
            size = min(left.size, right.size)
            assert abs(np.corrcoef(left[:size], right[:size])[0, 1]) < 0.2


@pytest.mark.parametrize(("d_model", "rank"), [(1, 1), (16, 1), (17, 2), (40, 3)])
def test_the_automatic_rank(d_model, rank):
    layer = eqx.filter_eval_shape(Mamba, d_model, key=jax.random.key(0))
    assert layer.dt_rank == rank
    assert layer.dt_proj.weight.shape == (2 * d_model, rank)


def test_narrow_parameters_leave_the_recurrence_wide():
    layer = Mamba(4, dtype=jnp.bfloat16, bias=True, key=jax.random.key(0))
    for linear in (layer.in_proj, layer.x_proj, layer.out_proj):
        assert linear.weight.dtype == jnp.bfloat16
    assert layer.conv.weight.dtype == layer.dt_proj.weight.dtype == jnp.bfloat16
    for wide in (layer.A_log, layer.D, layer.dt_proj.bias):
        assert wide is not None
        assert wide.dtype == jnp.float32


DEFAULTS: dict[str, Any] = {"d_model": 4, "d_state": 4}
OTHERS: dict[str, Any] = {
    "d_model": 5,
    "d_state": 3,
    "d_conv": 3,
    "expand": 3,
    "dt_rank": 2,
    "dt_min": 0.05,
    "dt_max": 1.0,
    "dt_init": "constant",
    "dt_scale": 3.0,
    "dt_init_floor": 0.09,
    "bias": True,
    "conv_bias": False,
    "activation": "gelu",
    "implementation": "reference",
    "conv_implementation": "reference",
    "dtype": jnp.bfloat16,
    "key": jax.random.key(1),
}


def test_every_argument_is_tested():
    names = list(inspect.signature(Mamba).parameters)
    assert sorted(names) == sorted(OTHERS)


@pytest.fixture(scope="module")
def default_description():
    return describe(Mamba(**DEFAULTS, key=jax.random.key(0)))


@pytest.mark.parametrize(
    "name", [name for name in OTHERS if not name.endswith("implementation")]
)
def test_every_argument_changes_the_layer(name, default_description):
    arguments = {**DEFAULTS, "key": jax.random.key(0), name: OTHERS[name]}
    assert differ(describe(Mamba(**arguments)), default_description)


@pytest.mark.parametrize(
    ("given", "scan", "conv"),
    [
        ({}, "fused", "fused"),
        ({"implementation": "xla"}, "xla", "xla"),
        ({"implementation": "reference"}, "reference", "reference"),
        ({"conv_implementation": "xla"}, "fused", "xla"),
        ({"implementation": "associative"}, "associative", "fused"),
        (
            {"implementation": "associative", "conv_implementation": "xla"},
            "associative",
            "xla",
        ),
    ],
)
def test_the_implementations_reach_both_kernels(given, scan, conv):
    layer = Mamba(**DEFAULTS, **given, key=jax.random.key(0))
    program = jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((7, 4)))
    expected = {("selective_scan", scan), ("causal_conv", conv)}
    assert traced_implementations(program) == expected
