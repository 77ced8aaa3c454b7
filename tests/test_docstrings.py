"""Every public name of the library shows an example, and the examples run."""

import inspect
import re
import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jaxtyping import Array, Float

from capibara_eqx import arrays, kernels, layers, models


# By the module too: kernels and layers have a `causal_conv` each.
PUBLIC = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (kernels, layers, models)
    for name in dir(module)
    # No modules, and no unions of types.
    if not name.startswith("_") and callable(getattr(module, name))
}
# What functions return is shown by the functions.
RESULTS = (
    "Conv1DCache",
    "EmbeddingCache",
    "HybridCache",
    "HippoDiagonal",
    "HippoMatrices",
    "LinearSSMCache",
    "KVCache",
    "Mamba2Cache",
    "Mamba3Cache",
    "MambaMetrics",
    "MambaOutput",
    "MambaCache",
    "S5Cache",
    "SSMStatus",
    "Cost",
    "Generation",
    "ModelCache",
    "ModelOutput",
    "StateSpaceCache",
)


def sequences(*widths: int) -> list[Array]:
    keys = jax.random.split(jax.random.key(0), len(widths))
    return [
        jax.random.normal(k, (2, 5, width))
        for k, width in zip(keys, widths, strict=True)
    ]


def surroundings() -> dict[str, Any]:
    """What the examples take as given."""
    key = jax.random.key(0)
    u, delta, B, C = sequences(3, 3, 2, 2)
    x, a = sequences(64, 64)
    return {
        **{
            "jax": jax,
            "jnp": jnp,
            "eqx": eqx,
            "optax": optax,
            "Array": Array,
            "Float": Float,
        },
        **{name.partition(".")[2]: value for name, value in PUBLIC.items()},
        **{"u": u, "u2": u, "delta": delta, "delta2": delta, "A": -jnp.ones((3, 2))},
        **{"B": B, "B2": B, "C": C, "C2": C, "key": key},
        **{"x": x, "x2": x, "x_t": x[:, 0], "a": a, "a2": a},
        **{"Affine": arrays.Affine, "compress": arrays.compress},
        "weight": jnp.ones((64, 1, 4)),
        "tokens": jnp.zeros((2, 5), "int32"),
        "mixer": layers.Mamba(64, key=key),
        "model": models.mamba_language_model(256, 64, 1, key=key),
    }


# Run as they stand, so that every operation is compiled by itself.
LONG = (
    "AbstractSequenceMixer",
    "Attention",
    "DecoupledAttention",
    "DiffusionNextTokenHead",
    "ExpertLoad",
    "Implementation",
    "LinearSSM",
    "Mamba2",
    "Mamba3",
    "MixtureOfRookies",
    "S4",
    "S4D",
    "S5",
    "UltraSSM",
    "attention",
    "create_ssm_config",
    "experts",
    "validate_ssm_system",
    "SparseCapibara",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if short in LONG else ())
        for name in sorted(PUBLIC)
        if (short := name.partition(".")[2]) not in RESULTS
    ],
)
def test_the_example_runs(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"{name} has no docstring"
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert examples, f"{name} shows no example"
    assert "!!! example" in text
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in examples:
            shown = {name.partition(".")[2]: PUBLIC[name]}
            exec(textwrap.dedent(example), surroundings() | shown)
