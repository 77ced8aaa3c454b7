"""Mamba behind a dictionary: its documents' examples, its fields, and its metrics."""

import dataclasses
import functools
import tomllib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mamba_oracle import mamba_row, parameters
from support.messages import refused
from support.programs import flops, turns
from support.quick import built
from support.tolerances import assert_close

from capibara_eqx.kernels import traced_implementations
from capibara_eqx.layers import (
    Linear,
    MambaConfig,
    MambaMetrics,
    MambaModule,
    _mamba_module,
)


SMALL: dict[str, Any] = {"hidden_size": 4, "d_state": 3, "dt_rank": 2}
OTHERS: dict[str, Any] = {
    "hidden_size": 6,
    "d_state": 5,
    "d_conv": 3,
    "expand_factor": 3,
    "dt_rank": 1,
    "activation": "relu",
    "use_tpu_optimizations": False,
    "scan_type": "linear",
    "enabled": False,
}
SCANS = [
    ("linear", True, "fused", "fused"),
    ("linear", False, "xla", "xla"),
    ("associative", True, "associative", "fused"),
    ("associative", False, "associative", "xla"),
]


@functools.cache
def make(**options) -> MambaModule:
    return built(MambaModule, MambaConfig(**(SMALL | options)), key=jax.random.key(0))


def abstract(**options) -> MambaModule:
    return eqx.filter_eval_shape(MambaModule, SMALL | options)


def rows(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def program(module, seq):
    x = jax.ShapeDtypeStruct((seq, module.config.hidden_size), jnp.float32)
    return eqx.filter_make_jaxpr(lambda module, x: module.mixer(x))(module, x)[0]


# The documents' own examples, at a size that a test can afford.


def test_the_basic_example():
    config = {
        "hidden_size": 8,
        "d_state": 6,
        "d_conv": 4,
        "expand_factor": 2,
        "scan_type": "associative",
    }
    mamba = MambaModule(config)
    inputs = rows(2, 12, 8)  # [batch, seq_len, hidden_size]
    assert inputs.dtype == np.float64
    outputs = mamba(inputs, training=False)
    print(f"Complexity: {outputs['metrics']['complexity']}")
    assert outputs["output"].shape == (2, 12, 8)
    assert outputs["output"].dtype == jnp.float32
    for row, y in zip(inputs.astype("float32"), outputs["output"], strict=True):
        expected, _ = mamba_row(parameters(mamba.mixer), row)
        assert_close(y, expected, dtype="float32", length=100)


def test_the_example_with_everything():
    config = {
        "hidden_size": 4,
        "d_state": 8,
        "d_conv": 8,
        "expand_factor": 4,
        "activation": "gelu",
        "use_tpu_optimizations": True,
        "scan_type": "associative",
    }
    mixer = eqx.filter_eval_shape(MambaModule, config).mixer
    assert (mixer.d_model, mixer.d_inner, mixer.d_state) == (4, 16, 8)
    assert (mixer.dt_rank, mixer.conv.kernel_size) == (32, 8)
    assert mixer.conv.activation == "gelu"


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_the_table_of_a_toml_file(enabled):
    table = tomllib.loads(f"""
        [modules]
        active = ["mamba", "embedding_module"]

        [modules.mamba]
        enabled = {enabled}
        hidden_size = 768
        d_state = 64
        d_conv = 4
        expand_factor = 2
        scan_type = "associative"
    """)
    module = eqx.filter_eval_shape(MambaModule, table["modules"]["mamba"])
    assert module.enabled is (enabled == "true")
    assert dataclasses.replace(module.config, enabled=True) == MambaConfig()


def test_the_defaults_are_those_of_the_documents():
    assert dataclasses.asdict(MambaConfig()) == {
        "hidden_size": 768,
        "d_state": 64,
        "d_conv": 4,
        "expand_factor": 2,
        "dt_rank": 32,
        "activation": "swish",
        "use_tpu_optimizations": True,
        "scan_type": "associative",
        "enabled": True,
    }


# Every field counts.


def test_every_field_is_tested():
    assert {field.name for field in dataclasses.fields(MambaConfig)} == set(OTHERS)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "enabled"])
def test_every_field_changes_the_layer(name):
    before, after = abstract().mixer, abstract(**{name: OTHERS[name]}).mixer
    assert not eqx.tree_equal(before, after)


def test_every_activation_changes_the_output():
    x = rows(5, 4)
    found = [make(activation=name)(x) for name in ("swish", "gelu", "relu")]
    swish, gelu, relu = (outputs["output"] for outputs in found)
    for one, other in ((swish, gelu), (gelu, relu), (relu, swish)):
        assert np.max(np.abs(one - other)) > 1e-4


@pytest.mark.parametrize(("scan_type", "optimised", "scan", "conv"), SCANS)
def test_what_runs(scan_type, optimised, scan, conv):
    module = abstract(scan_type=scan_type, use_tpu_optimizations=optimised)
    expected = {("selective_scan", scan), ("causal_conv", conv)}
    assert traced_implementations(program(module, 5)) == expected


@pytest.mark.parametrize(("scan_type", "optimised", "scan", "conv"), SCANS)
def test_every_scan_gives_the_same(scan_type, optimised, scan, conv):
    module = make(scan_type=scan_type, use_tpu_optimizations=optimised)
    x = rows(2, 9, 4).astype("float32")
    outputs = module(x)
    for row, y in zip(x, outputs["output"], strict=True):
        expected, _ = mamba_row(parameters(module.mixer), row)
        assert_close(y, expected, dtype="float32", length=50)


def test_training_changes_nothing():
    x = rows(5, 4)
    np.testing.assert_array_equal(
        make()(x, training=True)["output"], make()(x, training=False)["output"]
    )


@pytest.mark.slow
def test_without_a_key_modules_are_equal_and_with_one_they_are_not():
    config = MambaConfig(**SMALL)
    default = eqx.filter_jit(MambaModule)(config)
    same, other = (built(MambaModule, config, key=jax.random.key(k)) for k in (0, 1))
    assert eqx.tree_equal(default, same)
    assert not eqx.tree_equal(default, other)


# The metrics are what happened.


@pytest.mark.parametrize("scan_type", ["linear", "associative"])
def test_the_metrics(scan_type):
    module = make(scan_type=scan_type)
    metrics = module(rows(2, 9, 4))["metrics"]
    cache = jax.tree.leaves(module.mixer.init_cache((2,)))
    assert metrics == {
        "mamba_active": True,
        "complexity": {
            "work": "O(n)",
            "depth": {"linear": "O(n)", "associative": "O(log n)"}[scan_type],
        },
        "sequence_length": 9,
        "d_state": 3,
        "selective_scan_used": True,
        "tpu_optimized": False,
        "state_bytes": sum(np.asarray(leaf).nbytes for leaf in cache),
    }
    assert set(metrics) == set(MambaMetrics.__annotations__)


def test_depth_is_as_the_metrics_say():
    """Loops that grow with the length there are in the linear scan alone."""
    linear, associative = (
        [turns(program(abstract(scan_type=name), seq).jaxpr) for seq in (64, 1024)]
        for name in ("linear", "associative")
    )
    assert associative == [3, 3]  # d_state
    # A fused kernel is one equation, which reads the tokens inside.
    portable = abstract(scan_type="linear", use_tpu_optimizations=False)
    assert linear == [0, 0]
    assert [turns(program(portable, seq).jaxpr) for seq in (64, 1024)] == [64, 1024]


def test_work_is_linear_as_the_metrics_say():
    module = make(scan_type="associative")
    count = {
        seq: flops(lambda x: module.mixer(x), jnp.zeros((seq, 4))) for seq in (256, 512)
    }
    assert count[512] / count[256] == pytest.approx(2.0, rel=0.02)


class _NoScan(eqx.Module):
    in_proj: Linear

    def __call__(self, x):
        return self.in_proj(x)

    def init_cache(self, batch_shape):
        return jnp.zeros((*batch_shape, 2), jnp.float32)


def test_a_scan_that_is_not_there_is_not_reported():
    mixer = _NoScan(Linear(4, 4, key=jax.random.key(0)))
    metrics = eqx.tree_at(lambda m: m.mixer, make(), mixer)(rows(3, 5, 4))["metrics"]
    assert metrics["selective_scan_used"] is False
    assert metrics["complexity"] == {"work": "O(n)", "depth": "O(1)"}
    assert metrics["state_bytes"] == 3 * 2 * 4


@pytest.mark.parametrize(
    ("scan_type", "optimised", "pallas"),
    [
        ("linear", True, True),
        ("linear", False, False),
        ("associative", True, True),  # the convolution
        ("associative", False, False),
    ],
)
def test_a_kernel_is_reported_where_a_tpu_would_run_it(scan_type, optimised, pallas):
    config = {"hidden_size": 128, "d_state": 16, "dt_rank": 8}
    options = {"scan_type": scan_type, "use_tpu_optimizations": optimised}
    module = eqx.filter_eval_shape(MambaModule, config | options)
    x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    arrays, rest = eqx.partition(module.mixer, is_shape)
    traced = _mamba_module._mixed.trace(rest, arrays, x)
    assert _mamba_module._runs_pallas(traced, "tpu") is pallas
    assert _mamba_module._runs_pallas(traced, "cpu") is False


# Inside transformations.


@pytest.mark.slow
def test_inside_jit_and_grad():
    module, x = make(), jnp.asarray(rows(2, 5, 4), "float32")
    eager = module(x)
    jitted = eqx.filter_jit(lambda module, x: module(x))(module, x)
    assert jitted["metrics"] == eager["metrics"]
    assert_close(jitted["output"], eager["output"], dtype="float32", length=50)
    gradient = eqx.filter_grad(lambda m, x: jnp.sum(m(x)["output"] ** 2))(module, x)
    assert np.any(gradient.mixer.A_log != 0)
    plain = eqx.filter_grad(lambda m, x: jnp.sum(m.mixer(x) ** 2))(module, x)
    assert_close(gradient.mixer.A_log, plain.mixer.A_log, dtype="float32", length=100)


def test_arrays_of_jax_keep_their_dtype():
    x = jnp.asarray(rows(5, 4), jnp.bfloat16)
    assert make()(x)["output"].dtype == jnp.bfloat16
    narrow = built(MambaModule, SMALL, jnp.bfloat16, key=jax.random.key(0))
    assert narrow(rows(5, 4))["output"].dtype == jnp.bfloat16


# Bad arguments.


@pytest.mark.errors
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"d_sate": 3}, ["MambaModule", "`d_sate`", "Did you mean 'd_state'"]),
        ({"expand": 2}, ["MambaModule", "`expand`", "'expand_factor'"]),
        ({"activation": "swihs"}, ["`activation`", "Did you mean 'swish'"]),
        ({"activation": "silu"}, ["`activation`", "'silu'", "'swish'"]),
        ({"scan_type": "associativ"}, ["`scan_type`", "Did you mean 'associative'"]),
        ({"hidden_size": 0}, ["`hidden_size`", "positive integer", "0"]),
        ({"dt_rank": "auto"}, ["`dt_rank`", "positive integer", "'auto'"]),
        ({"use_tpu_optimizations": 1}, ["`use_tpu_optimizations`", "True or False"]),
        ({"enabled": "yes"}, ["`enabled`", "True or False", "'yes'"]),
        (768, ["`config`", "MambaConfig", "mapping", "768"]),
    ],
)
def test_a_configuration_that_does_not_fit(config, words):
    with refused(*words):
        MambaModule(config)


@pytest.mark.errors
def test_a_module_that_is_not_enabled_does_not_run():
    with refused("MambaModule", "`enabled`", "module.enabled"):
        make(enabled=False)(rows(5, 4))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (np.zeros((5, 3)), ["`inputs`", "4", "(5, 3)"]),
        (np.zeros(4), ["`inputs`", "sequence", "(4,)"]),
        (np.zeros((0, 4)), ["`inputs`", "zero-length"]),
        (np.zeros((5, 4), int), ["`inputs`", "floating point", "int64", "asarray"]),
        (jnp.zeros((5, 4), "int32"), ["`inputs`", "floating point", "int32"]),
        ([[0.0] * 4], ["`inputs`", "array", "list"]),
    ],
)
def test_inputs_that_do_not_fit(inputs, words):
    with refused("MambaModule", *words):
        make()(inputs)
