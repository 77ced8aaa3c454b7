"""Inner loops that move adapters of low rank alone, also over weights of four bits."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import check_first_order
from support.lora_oracle import moved_adapters
from support.metala_oracle import fast_adapt, small_layer, small_task, weights_of
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.arrays import as_array
from capibara_eqx.layers import Linear
from capibara_eqx.meta import Task, adapt, maml, meta_value_and_grad, sgd
from capibara_eqx.transforms import (
    Affine,
    LoRA,
    Rule,
    dequantize,
    lora,
    quantize,
    trainable_spec,
)


RATE, STEPS = 0.1, 3
jit: Any = eqx.filter_jit
quick = functools.partial(jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def adapted_model(small: bool) -> Any:
    """A map with an adapter that is not zero, over four bits a weight if small."""
    model = filled(Linear, 5, 4, seed=0, size=0.5)
    if small:
        model, _ = quantize(model, [Rule("weight", Affine(4, group_size=3))])
    rules = [Rule("weight", LoRA(2, alpha=3))]
    model, _ = lora(model, rules, key=jax.random.key(0))
    parts = [
        jnp.asarray(0.5 * normal(seed, *shape), "float32")
        for seed, shape in ((1, (2, 5)), (2, (4, 2)))
    ]
    return eqx.tree_at(lambda m: (m.weight.a, m.weight.b), model, parts)


def loss(model, batch, *, key=None):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def looped(weight, bias, a, b, x, y):
    """Steps on the two factors, whose gradients follow from that of their product."""
    for _ in range(STEPS):
        error = x @ (weight + 1.5 * b @ a).T + bias - y
        of_product = 1.5 * 2 * error.T @ x / y.size
        a, b = a - RATE * b.T @ of_product, b - RATE * of_product @ a.T
    return a, b


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_only_adapters_move(small):
    model = adapted_model(small)
    x, y = normal(3, 6, 5), normal(4, 6, 4)
    batch = (jnp.asarray(x, "float32"), jnp.asarray(y, "float32"))
    where = trainable_spec(model)

    @quick
    def run(model, batch):
        return adapt(loss, model, batch, optimizer=sgd(RATE), steps=STEPS, where=where)

    after = run(model, batch)
    node = model.weight
    parts = (as_array(node.base), model.bias, node.a, node.b)
    weight, bias, a, b = (np.asarray(part, "float64") for part in parts)
    a, b = looped(weight, bias, a, b, x, y)
    assert_close(after.weight.a, a, dtype="float32", length=30)
    assert_close(after.weight.b, b, dtype="float32", length=30)
    assert eqx.tree_equal(after.weight.base, node.base)
    assert eqx.tree_equal(after.bias, model.bias)


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_meta_gradients_reach_adapters_alone(small):
    model = adapted_model(small)
    where = trainable_spec(model)
    sizes = {"support": 6, "query": 4}
    x = {part: jnp.asarray(normal(5, 3, n, 5), "float32") for part, n in sizes.items()}
    y = {part: jnp.asarray(normal(6, 3, n, 4), "float32") for part, n in sizes.items()}
    tasks = Task((x["support"], y["support"]), (x["query"], y["query"]))
    task_loss = maml(loss, optimizer=sgd(RATE), steps=STEPS, where=where)
    value, grads = quick(meta_value_and_grad(task_loss, tasks, where=where))(model)
    assert np.isfinite(value)
    assert jax.tree.leaves((grads.weight.base, grads.bias)) == []
    for grad in (grads.weight.a, grads.weight.b):
        assert np.all(np.isfinite(grad))
        assert np.max(np.abs(grad)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_meta_gradients_equal_differences(small):
    """Of the start of both factors, and of the examples."""
    model = adapted_model(small)
    where = trainable_spec(model)
    node = model.weight
    weight, bias = (np.asarray(v, "float64") for v in (as_array(node.base), model.bias))
    point = {
        "a": np.asarray(node.a, "float64"),
        "b": np.asarray(node.b, "float64"),
        "x": normal(7, 6, 5),
        "y": normal(8, 6, 4),
    }
    query, goal = normal(9, 3, 5), normal(10, 3, 4)

    def function(p):
        start = eqx.tree_at(lambda m: (m.weight.a, m.weight.b), model, (p["a"], p["b"]))
        after = adapt(
            loss,
            start,
            (p["x"], p["y"]),
            optimizer=sgd(RATE),
            steps=STEPS,
            where=where,
        )
        return loss(after, (jnp.asarray(query), jnp.asarray(goal)))

    def oracle(p):
        a, b = looped(weight, bias, p["a"], p["b"], p["x"], p["y"])
        return float(np.mean((query @ (weight + 1.5 * b @ a).T + bias - goal) ** 2))

    check_first_order(function, oracle, point)


@quick
def fast_adapted(layer, x, y, query):
    params = layer.adapt_parameters(layer.meta_weights, x, y)
    return params.weights, layer.apply_adapted_params(query, params)


def arrays(task):
    x, y, query = task
    return (
        jnp.asarray(x, "float32"),
        jnp.asarray(y, "int32"),
        jnp.asarray(query, "float32"),
    )


ENCODER = "net/.*_proj/weight"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["anil", "ridge"])
def test_heads_adapt_to_features_of_codes(method):
    layer = small_layer(method, 1)
    small, _ = quantize(layer, [Rule(ENCODER, Affine(4, group_size=3))])
    task = small_task("label", 1)
    _, got = fast_adapted(small, *arrays(task))
    want = fast_adapt(layer, weights_of(dequantize(small)), *task)
    assert_close(got, want, dtype="float32", length=200)


@pytest.mark.slow
def test_of_an_encoder_adapters_or_no_codes_adapt():
    layer = small_layer("maml", 1)
    small, _ = quantize(layer, [Rule(ENCODER, Affine(4, group_size=3))])
    every = weights_of(layer.meta_weights)
    names = {name for name in every if "proj/weight" not in name}
    assert set(weights_of(small.meta_weights)) == names
    both, _ = lora(small, [Rule(ENCODER, LoRA(1))], key=jax.random.key(0))
    both = moved_adapters(both, 2)
    start = both.meta_weights
    for name in weights_of(start):
        assert name.startswith("head/") or name.endswith(("weight/a", "weight/b"))
    after, got = fast_adapted(both, *arrays(small_task("label", 1)))
    assert np.all(np.isfinite(got))
    assert jax.tree.structure(after) == jax.tree.structure(start)
    for name, value in weights_of(after).items():
        assert np.any(value != weights_of(start)[name]), name
