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
from support.quick import filled

from capibara_eqx import arrays, kernels, layers, meta, models, transforms


# By the module too: kernels and layers have a `causal_conv` each.
PUBLIC = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (arrays, kernels, layers, meta, meta.tasks, models, transforms)
    for name in dir(module)
    # No modules, and no unions of types.
    if not name.startswith("_") and callable(getattr(module, name))
}
# What functions return is shown by the functions; what reads a file or the data of
# another package has tests of its own.
RESULTS = (
    "digits",
    "omniglot",
    "Conv1DCache",
    "DeltaNetCache",
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
    "MesaNetCache",
    "MetaState",
    "MetaLinearAttentionCache",
    "S5Cache",
    "SSMStatus",
    "Cost",
    "Generation",
    "ModelCache",
    "ModelOutput",
    "StateSpaceCache",
    "SparseTrainingState",
    "TTTCache",
    "ZeroPrediction",
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
    tokens = jnp.zeros((2, 5), "int32")
    return {
        **{
            "jax": jax,
            "jnp": jnp,
            "layers": layers,
            "eqx": eqx,
            "optax": optax,
            "Array": Array,
            "Float": Float,
        },
        **{name.partition(".")[2]: value for name, value in PUBLIC.items()},
        **{"u": u, "u2": u, "delta": delta, "delta2": delta, "A": -jnp.ones((3, 2))},
        **{"B": B, "B2": B, "C": C, "C2": C, "key": key},
        **{"x": x, "x2": x, "x_t": x[:, 0], "a": a, "a2": a},
        "weight": jnp.ones((64, 1, 4)),
        "tokens": tokens,
        "mixer": layers.Mamba(64, key=key),
        "linear": layers.Linear(64, 64, key=key),
        "layer": layers.Linear(64, 64, key=key),
        "batches": [tokens],
        "forward": lambda model, x: model(x),
        "loss": lambda model: jnp.mean(model(tokens) ** 2),
        "model": models.mamba_language_model(256, 64, 1, key=key),
    }


def before(name: str) -> dict[str, Any]:
    """What the examples of one name take as given besides."""
    key = jax.random.key(0)
    linear: Any = layers.Linear(64, 64, key=key)
    every = [transforms.Rule(".*weight", transforms.Affine(4))]
    if name in ("AffineArray", "LoRAArray", "SparseArray"):
        return {"x": jnp.ones(64)}
    if name in ("MetaLA", "AdaptedParams"):
        return {"x": jnp.ones((2, 5, 64))}
    if name == "r2d2":
        labelled = jnp.ones((2, 5, 64)), jnp.tile(jnp.arange(5), (2, 1))
        return {"model": linear, "tasks": meta.Task(labelled, labelled)}
    if name == "sparsify":
        return {"x": jnp.ones((5, 64))}
    if name == "convert":
        return {"model": transforms.prepare_qat(linear, every)[0]}
    adapters = [transforms.Rule(".*weight", transforms.LoRA(2))]
    if name == "merge":
        return {"model": transforms.lora(linear, adapters, key=key)[0]}
    if name in ("lora", "attention_rules"):
        return {"model": layers.Attention(64, 4, key=key)}
    if name in ("calibrate", "Calibration", "Hessians"):
        model = models.mamba_language_model(256, 64, 1, tie_embeddings=False, key=key)
        return {"model": model}
    if name == "sparse_masks":
        rules = [transforms.Rule(".*weight", transforms.Unstructured(0.5))]
        optimizer = transforms.rigl(optax.sgd(0.1), rules, t_end=10)
        return {"state": optimizer.init(linear)}
    return {}


class Headed(eqx.Module):
    """A model with a head, for inner loops."""

    body: layers.Linear
    head: layers.Linear

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


def inner_loops() -> dict[str, Any]:
    """What the examples of `meta` take as given."""
    body = filled(layers.Linear, 1, 3, seed=0, size=1.0)
    model = Headed(body, filled(layers.Linear, 3, 1, seed=1, size=1.0))
    x = jnp.linspace(-1, 1, 10)[:, None]
    support, query = (x[:5], x[:5] ** 2), (x[5:], x[5:] ** 2)
    task = meta.Task(support, query)

    def loss(model, batch, *, key=None):
        x, y = batch
        return jnp.mean((model(x) - y) ** 2)

    return {
        **{"model": model, "loss": loss, "x": x, "y": x**2, "epoch": 3},
        **{"support": support, "query": query, "task": task},
        "tasks": jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), task),
        "task_loss": meta.maml(loss, optimizer=meta.sgd(0.1), steps=1),
        "network": filled(layers.Linear, 1 + 5, 1, seed=2, size=1.0),
    }


def few_shot() -> dict[str, Any]:
    """What the examples of `meta.tasks` take as given."""
    examples = jnp.zeros((60, 8, 8)), jnp.arange(60) % 10
    return {"pool": meta.tasks.ClassPool.init(*examples)}


# Run as they stand, so that every operation is compiled by itself.
LONG = (
    "AbstractSequenceMixer",
    "Attention",
    "DecoupledAttention",
    "DeltaNet",
    "DiffusionNextTokenHead",
    "ExpertLoad",
    "Implementation",
    "LinearSSM",
    "Mamba2",
    "Mamba3",
    "MesaNet",
    "MetaLinearAttention",
    "MixtureOfRookies",
    "S4",
    "S4D",
    "S5",
    "TTTLinear",
    "UltraSSM",
    "adapt",
    "adapt_trajectory",
    "imaml",
    "implicit_adapt",
    "MetaLA",
    "AdaptedParams",
    "attention",
    "create_ssm_config",
    "delta_rule",
    "experts",
    "make_meta_step",
    "maml",
    "meta_sgd",
    "meta_value_and_grad",
    "safe_adam",
    "sgd",
    "validate_ssm_system",
    "SparseCapibara",
    "dequantize",
    "erk_rules",
    "gptq",
    "prepare_qat",
    "sparsify",
    "trainable_spec",
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
            known = surroundings()
            known |= inner_loops() if name.startswith("meta.") else {}
            known |= few_shot() if name.startswith("tasks.") else {}
            known |= before(name.partition(".")[2])
            exec(textwrap.dedent(example), known | shown)
