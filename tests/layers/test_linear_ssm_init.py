"""How a LinearSSM starts, its dropout, and that every argument counts."""

import inspect
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.quick import built, filled

from capibara_eqx.layers import LinearSSM, hippo_initialization, weight_decay_mask


# The keys are fixed, so that a distribution test gives the same answer every time.
LEVEL = 1e-3


@pytest.fixture(scope="module")
def wide_layer():
    """Enough numbers for statistics."""
    return built(LinearSSM, 40, 30, 20, 5, key=jax.random.key(0))


def is_normal(values, scale):
    values = np.asarray(values, "float64") / scale
    return stats.kstest(values.ravel(), "norm").pvalue > LEVEL


def test_the_matrix_is_that_of_hippo_and_the_rest_is_normal(wide_layer):
    np.testing.assert_array_equal(wide_layer.A, hippo_initialization(20))
    hippo_size = np.sqrt(2 * np.arange(20) + 1)[:, None]
    assert is_normal(wide_layer.B, hippo_size / math.sqrt(40))
    assert is_normal(wide_layer.C, 1 / math.sqrt(20))
    assert is_normal(wide_layer.D, 1 / math.sqrt(40))
    assert is_normal(wide_layer.conv.weight, 1 / math.sqrt(5))
    assert is_normal(wide_layer.residual_proj.weight, 1 / math.sqrt(40))
    assert not np.any(wide_layer.conv.bias)
    assert not np.any(wide_layer.residual_proj.bias)


def test_the_step_size_is_log_uniform():
    def log_dt(key):
        return LinearSSM(1, 1, 1, dt_min=0.01, dt_max=0.5, key=key).log_dt

    found = jax.jit(jax.vmap(log_dt))(jax.random.split(jax.random.key(1), 500))
    low, high = math.log(0.01), math.log(0.5)
    test = stats.kstest(np.asarray(found), "uniform", (low, high - low))
    assert test.pvalue > LEVEL


def test_no_two_parameters_share_their_random_numbers(wide_layer):
    arrays = [wide_layer.B, wide_layer.C, wide_layer.D, wide_layer.conv.weight]
    arrays = [np.ravel(a) for a in [*arrays, wide_layer.residual_proj.weight]]
    for i, left in enumerate(arrays):
        for right in arrays[:i]:
            size = min(left.size, right.size)
            assert abs(np.corrcoef(left[:size], right[:size])[0, 1]) < 0.25


def test_what_decays():
    mask = weight_decay_mask(filled(LinearSSM, **DEFAULTS, seed=0, size=1.0))
    leaves = jax.tree.leaves_with_path(mask)
    assert {jax.tree_util.keystr(path) for path, decays in leaves if not decays} == {
        *(".A", ".log_dt", ".conv.bias", ".residual_proj.bias"),
        *(".dropout.p", ".dropout.inference"),
    }


def _small(key, **options):
    return LinearSSM(**{**DEFAULTS, "key": key, **options})


def test_narrow_parameters_leave_the_dynamics_wide():
    layer = eqx.filter_eval_shape(_small, jax.random.key(0), dtype=jnp.bfloat16)
    assert layer.A.dtype == layer.log_dt.dtype == jnp.float32
    for narrow in (layer.B, layer.C, layer.D, layer.conv.weight):
        assert narrow.dtype == jnp.bfloat16
    assert layer.residual_proj.weight.dtype == jnp.bfloat16


DEFAULTS: dict[str, Any] = {
    "input_dim": 3,
    "output_dim": 2,
    "state_dim": 3,
    "dropout_rate": 0.0,
    # Quick to compile, and steps large enough for the other rule to differ.
    "discretization": "bilinear",
    "dt_min": 0.2,
    "dt_max": 0.5,
}
OTHERS: dict[str, Any] = {
    "input_dim": 2,
    "output_dim": 3,
    "state_dim": 4,
    "conv_dim": 3,
    "dropout_rate": 0.5,
    "measure": "legt",
    "discretization": "zoh",
    "dt_min": 0.4,
    "dt_max": 2.0,
    "residual": False,
    "dtype": jnp.bfloat16,
    "implementation": "reference",
    "key": jax.random.key(1),
}


def shapes(arguments):
    layer = eqx.filter_eval_shape(LinearSSM, **arguments)
    leaves = jax.tree.leaves_with_path(layer)
    return [
        (path, leaf.shape, leaf.dtype)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    ]


@eqx.filter_jit
def outputs(arguments):
    """What the layer makes of one input."""
    x = jnp.sin(jnp.arange(21.0)).reshape(7, 3)
    return LinearSSM(**arguments)(x, key=jax.random.key(3))


def test_every_argument_is_tested():
    assert sorted(inspect.signature(LinearSSM).parameters) == sorted(OTHERS)


@pytest.fixture(scope="module")
def default_outputs():
    return outputs({**DEFAULTS, "key": jax.random.key(0)})


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "implementation"])
def test_every_argument_changes_the_layer(name, default_outputs):
    default = {**DEFAULTS, "key": jax.random.key(0)}
    arguments = default | {name: OTHERS[name]}
    if shapes(arguments) == shapes(default):
        assert np.any(np.abs(outputs(arguments) - default_outputs) > 1e-6)


def test_the_implementation_reaches_the_convolution():
    layer = eqx.filter_eval_shape(_small, jax.random.key(0), implementation="xla")
    assert layer.conv.implementation == "xla"


def test_dropout_drops_the_readout_and_not_the_residual():
    options = {"dropout_rate": 0.25, "discretization": "bilinear"}
    layer = filled(LinearSSM, 4, 4, 2, **options, seed=2, size=0.5)
    layer = eqx.tree_at(lambda m: m.A, layer, -jnp.eye(2))
    x = np.random.default_rng(0).standard_normal((1, 50, 4)).astype("float32")

    @eqx.filter_jit
    def run(layer, x, key):
        quiet = eqx.nn.inference_mode(layer)
        called = layer(x, key=key), layer.forward(x, key=key)[0]
        return called, (
            quiet(x),
            quiet.forward(x)[0],
            layer.prefill(x, layer.init_cache((1,)))[0],
        )

    (y, forward), (want, *others) = run(layer, x, jax.random.key(4))
    np.testing.assert_array_equal(forward, y)
    for other in others:
        np.testing.assert_array_equal(other, want)
    left, whole = np.asarray(y - x), np.asarray(want - x)
    dropped = left == 0
    np.testing.assert_allclose(left[~dropped], whole[~dropped] / 0.75, atol=1e-6)
    assert stats.binomtest(int(dropped.sum()), dropped.size, 0.25).pvalue > LEVEL
