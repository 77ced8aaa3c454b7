"""Meta-learning attention against NumPy loops, and its known answers."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metala_oracle import (
    fast_adapt,
    features,
    predict,
    small_layer,
    small_task,
    weights_of,
)
from support.tolerances import assert_close


METHODS = ("maml", "anil", "ridge")
TARGETS = ("step", "sequence", "label a step", "label")
# Of ridge regression the limits are quick; the others are slow, as each is compiled.
QUICK = {("maml", "label"), ("anil", "step")}
seeds = st.integers(0, 2**16)
jit: Any = eqx.filter_jit
quick = functools.partial(jit, compiler_options={"xla_backend_optimization_level": 0})
call = quick(lambda layer, x, ids=None, key=None: layer(x, segment_ids=ids, key=key))


@quick
def run(layer, x, y, query):
    return layer.fast_adapt(x, y, query)


def arrays(task, dtype="float32"):
    x, y, query = task
    kind = dtype if np.issubdtype(y.dtype, np.floating) else "int32"
    return jnp.asarray(x, dtype), jnp.asarray(y, kind), jnp.asarray(query, dtype)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        pytest.param(m, t, marks=() if (m, t) in QUICK else pytest.mark.slow)
        for m in METHODS
        for t in TARGETS
    ],
)
@settings(max_examples=3)
@given(seed=seeds)
def test_equals_the_loop(method, targets, seed):
    # Every number of a network that adapts costs the loop two passes.
    width = 2 if method == "maml" else 4
    layer = small_layer(method, seed, width)
    task = small_task(targets, seed, width)
    got = run(layer, *arrays(task))
    assert got.shape == ((2, 4, 3) if "step" in targets else (2, 3))
    want = fast_adapt(layer, weights_of(layer), *task)
    # The widest sum is that over all rows of a system that is solved.
    assert_close(got, want, dtype="float32", length=200)


@pytest.mark.slow
def test_without_steps_it_is_the_start():
    layer = small_layer("anil", 0, adaptation_steps=0)
    task = small_task("label", 0)

    @quick
    def both(layer, x, y, query):
        params = layer.adapt_parameters(layer.meta_weights, x, y)
        return params, layer.apply_adapted_params(query, params)

    params, got = both(layer, *arrays(task))
    assert params.pooled
    assert eqx.tree_equal(params.weights, layer.meta_weights)
    want = predict(layer, weights_of(layer), task[2], pooled=True)
    assert_close(got, want, dtype="float32", length=50)


def test_one_step_of_the_head_and_its_meta_gradient():
    """On a quadratic, with Hessian H and rate a, it is (I - a H) of the plain one."""
    layer = small_layer("anil", 3, adaptation_steps=1)
    x, y, query = small_task("step", 3)
    rng = np.random.default_rng(4)
    goal = rng.standard_normal((2, 4, 3))

    @quick
    def outer(meta_weights, goal, x, y, query):
        def loss(meta_weights):
            params = layer.adapt_parameters(meta_weights, x, y)
            predictions = layer.apply_adapted_params(query, params)
            # Of mean (p - y)^2 / 2 the adapted weights themselves are of use as well.
            return jnp.sum((predictions - goal) ** 2) / 2, params.weights.head

        return jax.value_and_grad(loss, has_aux=True)(meta_weights)

    (_, head), grads = outer(
        layer.meta_weights, jnp.asarray(goal, "float32"), *arrays((x, y, query))
    )
    w = weights_of(layer)
    start = np.column_stack([w["net/head/weight"], w["net/head/bias"]])

    def rows(x):
        z = features(layer, w, x, pooled=False).reshape(-1, 4)
        return np.column_stack([z, np.ones(len(z))])

    z, z_query, rate = rows(x), rows(query), w["inner_rate"]
    moved = start - rate * (start @ z.T - y.reshape(-1, 3).T) @ z / len(z)
    got = whole(head)
    assert_close(got, moved, dtype="float32", length=60)
    of_loss = (moved @ z_query.T - goal.reshape(-1, 3).T) @ z_query
    want = of_loss @ (np.eye(5) - rate * z.T @ z / len(z))
    got = whole(grads.head)
    assert_close(got, want, dtype="float32", length=60)
    assert jax.tree.leaves((grads.encoder, grads.norm)) == []


def whole(head):
    """The weight and the bias as one matrix."""
    return np.column_stack([head.weight, head.bias]).astype("float64")


@quick
def adapted_head(layer, log_lambda, x, y):
    layer = eqx.tree_at(lambda layer: layer.log_lambda, layer, log_lambda)
    return layer.adapt_parameters(layer.meta_weights, x, y).weights.head


def test_ridge_limits():
    """An infinite penalty leaves the start, none interpolates fewer rows than weights.

    Of the four features and the 1 three rows determine three directions.
    """
    layer = small_layer("ridge", 5)
    x, y, query = arrays(small_task("sequence", 5, n=3))
    start = whole(layer.net.head)
    far = whole(adapted_head(layer, jnp.asarray(30.0), x, y))
    assert_close(far, start, dtype="float32", length=10)
    near = whole(adapted_head(layer, jnp.asarray(-12.0), x, y))
    z = features(layer, weights_of(layer), np.asarray(x), pooled=True)
    ones = np.column_stack([z, np.ones(3)])
    np.testing.assert_allclose(ones @ near.T, y, atol=2e-3)
    # And of all that interpolate it is the one nearest to the start.
    moved = near - start
    inside = ones.T @ np.linalg.solve(ones @ ones.T, ones @ moved.T)
    np.testing.assert_allclose(moved.T, inside, atol=2e-3)


def same_arrays(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b for a, b in pairs)


def test_meta_weights_are_what_adapts():
    layers = {method: small_layer(method, 0) for method in METHODS}
    for method, layer in layers.items():
        adapts = layer.meta_weights
        leaves = jax.tree.leaves(adapts)
        assert all(eqx.is_inexact_array(leaf) for leaf in leaves)
        assert len(leaves) == (13 if method == "maml" else 2)
        assert adapts.head.weight is layer.net.head.weight
        other = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, adapts)
        replaced = layer.with_meta_weights(other)
        assert same_arrays(replaced.meta_weights, other)
        assert same_arrays(replaced.with_meta_weights(adapts), layer)
        frozen = replaced.net.encoder.attention.q_proj.weight
        assert (frozen is layer.net.encoder.attention.q_proj.weight) == (
            method != "maml"
        )
    assert layers["anil"].inner_rate == np.float32(0.3)
    assert layers["ridge"].inner_rate is None


@pytest.mark.slow
def test_steps_of_a_head_cannot_diverge():
    """At a rate below 1, on features of unit length, the loss falls at every step."""
    x, y, _ = arrays(small_task("step", 0))
    losses = []
    for steps in (1, 2):
        layer = small_layer("anil", 0, adaptation_steps=steps)
        layer = eqx.tree_at(
            lambda layer: (layer.inner_rate, layer.net.norm.weight),
            layer,
            (jnp.asarray(0.99), jnp.ones(4)),
        )
        # All features alike have the largest curvature.
        alike = jnp.broadcast_to(100 * x[:1, :1], x.shape)
        losses.append(np.mean((run(layer, alike, y, alike) - y) ** 2))
    assert losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_batch_axes_are_vmap(batch):
    layer = small_layer("maml", 1)
    x = normal(2, *batch, 3, 4)
    want = np.stack(
        [call(layer, row) for row in x.reshape(-1, 3, 4)],
    ).reshape(x.shape)
    assert_close(call(layer, x), want, dtype="float32", length=20)


def test_packed_documents_are_separate_and_seen_both_ways():
    layer = small_layer("maml", 1)
    x = normal(3, 7, 4)
    ids = jnp.asarray([0, 0, 0, -1, 1, 1, 1])
    packed = call(layer, x.at[3].set(jnp.nan), ids)
    assert_close(packed[:3], call(layer, x[:3]), dtype="float32", length=20)
    assert_close(packed[4:], call(layer, x[4:]), dtype="float32", length=20)
    np.testing.assert_array_equal(packed[3], 0)
    later = call(layer, x[:3].at[2].add(1.0))
    assert np.all(np.any(np.abs(later - packed[:3]) > 1e-4, axis=-1))


@pytest.mark.slow
def test_dropout_is_random_and_off_in_inference():
    layer = small_layer("maml", 1, dropout_rate=0.5)
    x = normal(2, 2, 3, 4)
    first, second, again = (
        call(layer, x, key=jax.random.key(seed)) for seed in (0, 1, 0)
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)
    off = call(eqx.nn.inference_mode(layer), x, key=jax.random.key(0))
    np.testing.assert_array_equal(off, call(small_layer("maml", 1), x))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_dropout_of_support_and_query_is_random(method):
    layer = small_layer(method, 1, dropout_rate=0.5)
    x, y, query = arrays(small_task("step", 1))

    @quick
    def keyed(layer, query, key):
        return layer.fast_adapt(x, y, query, key=key)

    results = [keyed(layer, query, jax.random.key(seed)) for seed in (0, 1, 0)]
    assert not np.array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    off = keyed(eqx.nn.inference_mode(layer), query, jax.random.key(0))
    want = run(small_layer(method, 1), x, y, query)
    assert_close(off, want, dtype="float32", length=50)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["step", "label"])
def test_tasks_are_a_batch_axis(method, targets):
    layer = small_layer(method, 2)
    tasks = [arrays(small_task(targets, seed)) for seed in range(3)]
    together = jax.tree.map(lambda *parts: jnp.stack(parts), *tasks)
    got = quick(lambda layer, t: jax.vmap(layer.fast_adapt)(*t))(layer, together)
    for row, task in zip(got, tasks, strict=True):
        assert_close(row, run(layer, *task), dtype="float32", length=50)
    # A start a task, as of several learners at once.
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), layer.meta_weights)
    several = quick(
        lambda layer, starts, x, y, query: jax.vmap(
            lambda start: layer.with_meta_weights(start).fast_adapt(x, y, query)
        )(starts)
    )(layer, starts, *tasks[0])
    assert_close(several[0], run(layer, *tasks[0]), dtype="float32", length=50)
    assert not np.allclose(several[0], several[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    """Activations alone, and parameters too: near the float32 result, in the dtype."""
    layer = small_layer(method, 6)
    x, y, query = arrays(small_task("step", 6), "bfloat16")
    want = run(layer, *(part.astype("float32") for part in (x, y, query)))
    got = run(layer, x, y, query)
    assert got.dtype == jnp.bfloat16
    assert_close(got, want, dtype="bfloat16", length=20)
    small = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16") if eqx.is_inexact_array(leaf) else leaf,
        layer,
    )
    assert_close(run(small, x, y, query), want, dtype="bfloat16", length=20)
