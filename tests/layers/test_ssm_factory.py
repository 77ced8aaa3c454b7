"""State space layers from configurations, as the documents that ask for them say."""

import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layer_arguments import describe, differ
from support.messages import refused
from support.quick import built
from support.tolerances import assert_close

from capibara_eqx.kernels import traced_implementations
from capibara_eqx.layers import (
    S4D,
    S5,
    HybridSSM,
    LinearSSM,
    Mamba,
    Mamba2,
    SSMConfig,
    SSMHybridLayerConfig,
    UltraSSM,
    _ssm_factory,
    create_ssm_config,
    create_ssm_layer,
)
from capibara_eqx.layers._ssm_config import PARAMETERS


KEY = jax.random.key(0)
OTHERS: dict[str, Any] = {
    "d_state": 6,
    "d_conv": 3,
    "expand": 3,
    "dt_rank": 2,
    "dt_min": 0.05,
    "dt_max": 1.0,
    "dt_init": "constant",
    "dt_scale": 3.0,
    "bias": True,
    "conv_bias": False,
    "use_fast_path": False,
    "dropout": 0.5,
}
LAYERS: dict[str, Any] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4": S4D,
    "s4d": S4D,
    "s5": S5,
    "linear": LinearSSM,
    "hybrid": HybridSSM,
    "ultra": UltraSSM,
}
EACH = [(kind, name) for kind in PARAMETERS for name in ("d_model", *PARAMETERS[kind])]


def make(*args, **options) -> Any:
    return built(create_ssm_layer, create_ssm_config(*args, **options), key=KEY)


# What a configuration says reaches the constructors.


@pytest.fixture
def constructed(monkeypatch):
    """A function from a configuration to all arguments of all constructors."""
    seen: dict[str, Any] = {}

    def recorded(layer):
        def build(*args, **options):
            bound = inspect.signature(layer).bind(*args, **options)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if name not in ("key", "ssm", "mixer"):
                    seen[f"{layer.__name__}.{name}"] = value
            return eqx.filter_eval_shape(functools.partial(layer, *args, **options))

        return build

    for layer in set(LAYERS.values()):
        monkeypatch.setattr(_ssm_factory, layer.__name__, recorded(layer))

    def arguments(*args, **options):
        seen.clear()
        made = create_ssm_layer(create_ssm_config(*args, **options))
        assert type(made) is LAYERS[args[0]]
        return dict(seen)

    return arguments


def expected(layer_type, name):
    """The arguments that a parameter changes, the other ones being the defaults."""
    inside: Any = {"hybrid": Mamba, "ultra": Mamba}.get(layer_type, LAYERS[layer_type])
    if name == "d_model" and layer_type == "linear":
        return {"LinearSSM.input_dim", "LinearSSM.output_dim"}
    found = {f"{inside.__name__}.{name}"}
    if name == "d_model":
        found |= {f"{LAYERS[layer_type].__name__}.d_model"}
    if layer_type == "mamba2" and name in ("d_model", "expand"):
        found |= {"Mamba2.head_dim"}
    theirs = {
        "LinearSSM.d_state": "LinearSSM.state_dim",
        "LinearSSM.d_conv": "LinearSSM.conv_dim",
        "LinearSSM.dropout": "LinearSSM.dropout_rate",
        "LinearSSM.use_fast_path": "LinearSSM.implementation",
        "Mamba.use_fast_path": "Mamba.implementation",
        "Mamba2.use_fast_path": "Mamba2.implementation",
        "S4D.use_fast_path": "S4D.mode",
        "S4D.dropout": "S4D.dropout_rate",
        "S5.dropout": "S5.dropout_rate",
        "Mamba.dropout": "UltraSSM.dropout_rate",
    }
    return {theirs.get(name, name) for name in found}


def test_every_parameter_is_tested():
    fields = list(SSMConfig.__dataclass_fields__)
    assert fields == ["layer_type", "d_model", *OTHERS]
    assert set(PARAMETERS) == set(LAYERS) == set(_ssm_factory._BUILDERS)
    assert {name for _, name in EACH} == {"d_model", *OTHERS}


@pytest.mark.parametrize(("layer_type", "name"), EACH)
def test_a_parameter_reaches_the_layer(layer_type, name, constructed):
    options = {"d_model": 6} if name == "d_model" else {"d_model": 4}
    before = constructed(layer_type, 4)
    after = constructed(layer_type, **options | {name: OTHERS.get(name, 6)})
    changed = {name for name in after if after[name] != before[name]}
    assert changed == expected(layer_type, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer_type", "name"),
    [(kind, name) for kind, name in EACH if name not in ("use_fast_path", "dropout")],
)
def test_a_parameter_changes_the_output(layer_type, name):
    def description(**options):
        layer = make(layer_type, **{"d_model": 4} | options)
        return describe(layer.ssm if layer_type == "hybrid" else layer)

    assert differ(description(**{name: OTHERS.get(name, 6)}), description())


@pytest.mark.parametrize(
    ("d_model", "expand", "head_dim"),
    [(64, 2, 64), (96, 2, 64), (36, 2, 36), (67, 1, 1), (25, 3, 25), (48, 1, 48)],
)
def test_heads_of_mamba2_divide_the_channels(d_model, expand, head_dim, constructed):
    found = constructed("mamba2", d_model, expand=expand)
    assert found["Mamba2.head_dim"] == head_dim


def test_the_rank_of_the_steps_is_a_sixteenth():
    config = create_ssm_config("mamba", 40)
    layer = eqx.filter_eval_shape(create_ssm_layer, config)
    assert isinstance(layer, Mamba)
    assert layer.dt_rank == 3


def test_ultra_is_built_to_save_time_and_memory():
    layer = eqx.filter_eval_shape(create_ssm_layer, create_ssm_config("ultra", 4))
    assert isinstance(layer, UltraSSM)
    assert (layer.compute_dtype, layer.remat, layer.chunk_size) == (
        "bfloat16",
        True,
        2048,
    )


# The fast path.


@pytest.mark.parametrize(
    ("layer_type", "operation"),
    [
        ("mamba", "selective_scan"),
        ("mamba", "causal_conv"),
        ("mamba2", "causal_conv"),
        ("linear", "causal_conv"),
        ("ultra", "selective_scan"),
    ],
)
def test_the_fast_path_is_the_fused_kernel(layer_type, operation):
    def program(use_fast_path):
        config = create_ssm_config(layer_type, 4, use_fast_path=use_fast_path)
        layer = eqx.filter_eval_shape(create_ssm_layer, config)
        x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
        jaxpr, *_ = eqx.filter_make_jaxpr(lambda layer, x: layer(x))(layer, x)
        return dict(traced_implementations(jaxpr))

    assert program(True)[operation] == "fused"
    assert program(False)[operation] == "xla"


def test_the_fast_path_of_s4_is_a_convolution():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((67, 2)), "float32")
    layers = [make("s4", 2, d_state=4, use_fast_path=fast) for fast in (True, False)]
    assert [layer.mode for layer in layers] == ["convolution", "recurrent"]
    fast, slow = (eqx.filter_jit(lambda layer, x: layer(x))(m, x) for m in layers)
    assert_close(fast, slow, dtype="float32", length=67 + 4)


# The documents' own examples, at a size that a test can afford.


def test_mamba_from_the_documents():
    config = create_ssm_config(
        layer_type="mamba",
        d_model=8,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        bias=False,
        conv_bias=True,
        use_fast_path=True,
    )
    assert config == create_ssm_config("mamba", 8)
    mamba_layer: Any = create_ssm_layer(config)
    x = jnp.ones((4, 64, 8))  # (batch, long_sequence, hidden_dim)
    output = mamba_layer(x)
    assert output.shape == x.shape
    assert np.all(np.isfinite(output))


def test_s4_from_the_documents():
    config = create_ssm_config(layer_type="s4", d_model=4, d_state=64, dropout=0.1)
    s4_layer: Any = create_ssm_layer(config)
    x = jnp.ones((2, 6, 4))
    first, again, other = (s4_layer(x, key=jax.random.key(k)) for k in (1, 1, 2))
    assert first.shape == x.shape
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_the_hybrid_from_the_documents():
    config = SSMHybridLayerConfig(
        d_model=4,
        ssm_threshold=8,  # Use SSM for seq_len > 8
        use_mamba=True,
        use_transformer=True,
    )
    hybrid = create_ssm_layer(config)
    assert isinstance(hybrid, HybridSSM)
    short, long = jnp.ones((2, 8, 4)), jnp.ones((2, 9, 4))
    assert hybrid.attention is not None
    assert hybrid.ssm is not None
    np.testing.assert_array_equal(hybrid(short), hybrid.attention(short))
    np.testing.assert_array_equal(hybrid(long), hybrid.ssm(long))


@pytest.mark.parametrize("left", ["use_mamba", "use_transformer"])
def test_a_hybrid_of_one_branch(left):
    options = {"use_mamba": False, "use_transformer": False} | {left: True}
    config = SSMHybridLayerConfig(4, **options)
    layer = eqx.filter_eval_shape(create_ssm_layer, config)
    assert isinstance(layer, HybridSSM)
    assert (layer.ssm is not None, layer.attention is not None) == (
        left == "use_mamba",
        left == "use_transformer",
    )


def test_without_a_key_layers_are_equal_and_with_one_they_are_not():
    config = create_ssm_config("s4", 2, d_state=2)
    default = eqx.filter_jit(create_ssm_layer)(config)
    same, other = (
        built(create_ssm_layer, config, key=jax.random.key(seed)) for seed in (0, 1)
    )
    assert eqx.tree_equal(default, same)
    assert not eqx.tree_equal(default, other)


def test_a_configuration_is_a_value():
    config = create_ssm_config("mamba", 4)
    assert {config: 1}[create_ssm_config("mamba", 4)] == 1
    with pytest.raises(AttributeError):
        config.d_state = 3  # pyright: ignore[reportAttributeAccessIssue]


# Bad arguments.


@pytest.mark.errors
@pytest.mark.parametrize(
    ("layer_type", "name"),
    [(k, n) for k, names in PARAMETERS.items() for n in OTHERS if n not in names],
)
def test_a_parameter_that_would_not_be_used(layer_type, name):
    users = [repr(kind) for kind, names in PARAMETERS.items() if name in names]
    with refused(f"`{name}`", repr(layer_type), *users, "Leave it out"):
        create_ssm_config(layer_type, 4, **{name: OTHERS[name]})


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layer_type": "mamba3"}, ["layer_type", "'mamba3'", "Did you mean 'mamba"]),
        ({"layer_type": "transformer"}, ["layer_type", "'s4'", "'ultra'"]),
        ({"d_sate": 3}, ["create_ssm_config", "`d_sate`", "Did you mean 'd_state'"]),
        ({"hidden_size": 3}, ["create_ssm_config", "`hidden_size`", "d_model"]),
        ({"d_model": 0}, ["`d_model`", "positive integer", "0"]),
        ({"d_model": "8"}, ["`d_model`", "positive integer", "'8'"]),
        ({"expand": 1.5}, ["`expand`", "positive integer", "1.5"]),
        ({"d_state": True}, ["`d_state`", "positive integer", "True"]),
        ({"bias": "no"}, ["`bias`", "True or False", "'no'"]),
        ({"use_fast_path": 1}, ["`use_fast_path`", "True or False", "1"]),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with refused(*words):
        create_ssm_config(**{"layer_type": "mamba", "d_model": 4} | arguments)


@pytest.mark.errors
def test_values_that_the_layer_refuses():
    with refused("dt_init", "Did you mean 'constant'"):
        create_ssm_layer(create_ssm_config("mamba", 4, dt_init="constnat"))
    with refused("`d_state`", "even"):
        create_ssm_layer(create_ssm_config("s4", 4, d_state=3))
    with refused("use_mamba", "use_transformer"):
        create_ssm_layer(SSMHybridLayerConfig(4, 8, False, False))
    with refused("`use_mamba`", "True or False"):
        SSMHybridLayerConfig(4, use_mamba="yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.errors
def test_something_that_is_no_configuration():
    with refused("`config`", "create_ssm_config", "SSMHybridLayerConfig", "'mamba'"):
        create_ssm_layer("mamba")  # pyright: ignore[reportArgumentType]
