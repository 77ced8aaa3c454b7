"""Sparse training inside other optimisers and around whole models; SR-STE."""

import functools
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import refused
from support.quick import filled
from support.sparsity_oracle import nm_mask

from capibara_eqx.layers import MLP, weight_decay_mask
from capibara_eqx.transforms import (
    NM,
    Rule,
    Ternary,
    Unstructured,
    magnitude_pruning,
    prepare_qat,
    quantize,
    rigl,
    set_training,
    sparse_masks,
    sparsify,
    sr_ste,
)


pytestmark = pytest.mark.slow


RULES = [Rule(r".*up.*weight", NM(2, 4)), Rule(r".*weight", Unstructured(0.25))]
KEPT = {"up_proj/weight": 6 * 8 // 2, "down_proj/weight": 8 * 6 // 4}
TIMES = {"alpha": 0.6, "delta_t": 2, "t_end": 9}


def random(shape, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, "float32").astype(dtype)


def trained(optimizer, params, gradients, state=None):
    """Parameters and state after updates by a row of gradients."""

    def step(carry, gradient):
        params, state = carry
        # optax divides numbers by counts of steps.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params) if state is None else state
    return jax.lax.scan(step, carry, gradients)[0]


def moments(state, name):
    """The trees of a state under a field of this name."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, name))
    return [getattr(node, name) for node in nodes if hasattr(node, name)]


def model_and_gradients(steps, dtype="float32"):
    """The floats of a layer alone, the rest filtered out, and rows of gradients."""
    model = filled(MLP, 8, 6, seed=0, size=1.0, dtype=dtype)
    params = eqx.filter(model, eqx.is_inexact_array)
    rows = [
        random((steps, *leaf.shape), i, dtype)
        for i, leaf in enumerate(jax.tree.leaves(params))
    ]
    return params, jax.tree.unflatten(jax.tree.structure(params), rows)


def check_sparse(params, masks):
    assert {path: int(mask.sum()) for path, mask in masks.items()} == KEPT
    up, down = params.up_proj, params.down_proj
    weights = {"up_proj/weight": up.weight, "down_proj/weight": down.weight}
    for path, weight in weights.items():
        values = np.asarray(weight.astype("float32"))
        assert (values[~np.asarray(masks[path])] == 0).all()
        assert (values != 0).sum() > KEPT[path] / 2
    groups = np.asarray(masks["up_proj/weight"]).reshape(-1, 4)
    assert (groups.sum(axis=1) == 2).all()


OPTIMIZERS = {
    "adamw": lambda: rigl(optax.adamw(0.1, mask=weight_decay_mask), RULES, **TIMES),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), rigl(optax.sgd(0.1, 0.9), RULES, **TIMES)
    ),
    "several steps": lambda: optax.MultiSteps(rigl(optax.adam(0.1), RULES, **TIMES), 2),
    "several steps inside": lambda: rigl(
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), RULES, **TIMES
    ),
    "factored": lambda: rigl(optax.adafactor(0.1), RULES, **TIMES),
    "random": lambda: set_training(
        optax.adam(0.1), RULES, **TIMES, key=jax.random.key(0)
    ),
    "pruned": lambda: magnitude_pruning(optax.adam(0.1), RULES, 2, begin=1, end=5),
}


QUICK = ("adamw", "several steps", "pruned")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_zeros_stay_whatever_is_around(name):
    params, gradients = model_and_gradients(10)
    optimizer = OPTIMIZERS[name]()
    params, state = jax.jit(functools.partial(trained, optimizer))(params, gradients)
    check_sparse(params, sparse_masks(state))


@pytest.mark.parametrize("name", ["adamw", "pruned"])
def test_bfloat16(name):
    params, gradients = model_and_gradients(10, "bfloat16")
    optimizer = OPTIMIZERS[name]()
    params, state = jax.jit(functools.partial(trained, optimizer))(params, gradients)
    assert params.up_proj.weight.dtype == jnp.bfloat16
    check_sparse(params, sparse_masks(state))


def test_weights_wider_than_their_gradients_become_zero():
    """An update of bfloat16 would not take a float32 weight to zero."""
    params = {"w": random((4, 8))}
    optimizer = rigl(optax.sgd(0.1), [Rule("w", NM(2, 4))], **TIMES)
    state: Any = optimizer.init(params)
    gradient = {"w": random((4, 8), 1, "bfloat16")}
    with jax.numpy_dtype_promotion("standard"):
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
    moved = params["w"] + updates["w"]
    assert (np.asarray(moved)[~np.asarray(state.masks["w"])] == 0).all()


@pytest.mark.parametrize("wrap", ["plain", "masked", "parted", "accumulated"])
def test_moments_of_new_weights_wherever_they_lie(wrap):
    """Zero exactly there, as they were elsewhere, at one change of places."""
    adam = optax.adam(0.1)
    labels = {"w": "a", "twin": "b"}
    inner = {
        "plain": adam,
        "masked": optax.masked(adam, {"w": True, "twin": False}),
        "parted": optax.multi_transform({"a": adam, "b": optax.sgd(0.1)}, labels),
        "accumulated": optax.MultiSteps(adam, 3).gradient_transformation(),
    }[wrap]
    field = "acc_grads" if wrap == "accumulated" else "mu"
    optimizer = rigl(inner, [Rule("w", Unstructured(0.5))], 0.9, 3, t_end=100)
    params = {"w": random((4, 6)), "twin": random((4, 6), 1)}
    rows = {"w": random((3, 4, 6), 2), "twin": random((3, 4, 6), 3)}

    @jax.jit
    def run(params, rows):
        early = jax.tree.map(lambda row: row[:2], rows)
        params, state = trained(optimizer, params, early)
        last = jax.tree.map(lambda row: row[2], rows)
        with jax.numpy_dtype_promotion("standard"):
            return state, optimizer.update(last, state, params)[1]

    before, after = run(params, rows)
    new = np.asarray(after.masks["w"] & ~before.masks["w"])
    assert new.sum() > 3
    (old_tree,), (tree,) = (moments(s.inner, field) for s in (before, after))
    old, found = np.asarray(old_tree["w"]), np.asarray(tree["w"])
    assert (found[new] == 0).all()
    np.testing.assert_array_equal(found[~new], old[~new])
    if wrap in ("plain", "accumulated"):
        np.testing.assert_array_equal(tree["twin"], old_tree["twin"])


def test_layers_of_a_stack_are_on_their_own():
    params = {"share": random((3, 4, 8)), "group": random((3, 4, 8), 1)}
    rows = {"share": random((7, 3, 4, 8), 2), "group": random((7, 3, 4, 8), 3)}
    rules = [Rule("share", Unstructured(0.4)), Rule("group", NM(1, 4))]
    run = functools.partial(trained, rigl(optax.adam(0.1), rules, **TIMES))
    stacked, state = jax.jit(run)(params, rows)
    each, own = jax.jit(jax.vmap(run, in_axes=(0, 1)))(params, rows)
    single = jax.jit(run)
    for name in params:
        np.testing.assert_array_equal(state.masks[name], own.masks[name])
        np.testing.assert_allclose(stacked[name], each[name], rtol=1e-6, atol=1e-7)
    for i in range(3):
        one, own = single(
            {name: value[i] for name, value in params.items()},
            {name: value[:, i] for name, value in rows.items()},
        )
        for name in params:
            np.testing.assert_array_equal(state.masks[name][i], own.masks[name])
            np.testing.assert_allclose(
                stacked[name][i], one[name], rtol=1e-6, atol=1e-7
            )


@pytest.mark.slow
def test_the_mean_of_several_steps_is_one():
    """MultiSteps around it: every second gradient counts twice."""
    params, rows = model_and_gradients(6)
    twice = jax.tree.map(lambda row: jnp.repeat(row, 2, axis=0), rows)
    whole = optax.MultiSteps(rigl(optax.adam(0.1), RULES, **TIMES), 2)
    plain = rigl(optax.adam(0.1), RULES, **TIMES)
    found, state = jax.jit(functools.partial(trained, whole))(params, twice)
    want, own = jax.jit(functools.partial(trained, plain))(params, rows)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    assert eqx.tree_equal(sparse_masks(state), sparse_masks(own))


def test_a_run_goes_on_from_a_file():
    """Masks, counts and moments are in it, and places are drawn by the count."""
    params, rows = model_and_gradients(4)
    optimizer = OPTIMIZERS["random"]()

    @jax.jit
    def more(params, state, rows):
        return trained(optimizer, params, rows, state)

    start = params, jax.jit(optimizer.init)(params)
    half = more(*start, rows)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, half)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, start)
    assert eqx.tree_equal(restored, half)
    assert eqx.tree_equal(more(*restored, rows), more(*half, rows))
    assert int(restored[1].count) == 4


def test_sparsified_models_start_at_their_masks_and_end_packed():
    model = filled(MLP, 8, 8, seed=0, size=1.0)
    rules = [Rule(".*weight", NM(2, 4))]
    sparse, _ = sparsify(model, rules)
    params, static = eqx.partition(sparse, eqx.is_inexact_array)
    optimizer = rigl(optax.sgd(0.1), rules, **TIMES)
    state: Any = optimizer.init(params)
    for path, weight in (
        ("up_proj/weight", params.up_proj.weight),
        ("down_proj/weight", params.down_proj.weight),
    ):
        np.testing.assert_array_equal(state.masks[path], weight != 0)
    rows = jax.tree.map(lambda leaf: random((5, *leaf.shape), leaf.size), params)
    params, state = jax.jit(functools.partial(trained, optimizer))(params, rows)
    whole = eqx.combine(params, static)
    packed, found = quantize(whole, rules)
    x = random((3, 8), 9)
    np.testing.assert_array_equal(packed.up_proj.weight.dense(), whole.up_proj.weight)
    np.testing.assert_allclose(packed(x), whole(x), rtol=1e-5, atol=1e-5)
    assert all(entry.density <= 0.5 for entry in found.entries)


@settings(max_examples=50)
@given(
    stacked=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_sr_ste_is_its_formula(stacked, dtype, seed):
    shape = (2, 3, 8) if stacked else (3, 8)
    weight, gradient = random(shape, seed, dtype), random(shape, seed + 1, dtype)
    got, bias = _pulled(weight, gradient)
    assert got.dtype == weight.dtype
    w, g = (np.asarray(v.astype("float32"), np.float64) for v in (weight, gradient))
    want = g + 0.125 * np.where(nm_mask(w, 2, 4), 0, w)
    limit = {"float32": 2.0**-22, "bfloat16": 2.0**-7}[dtype]
    assert np.abs(np.asarray(got.astype("float32")) - want).max() < limit * 4
    np.testing.assert_array_equal(bias, jnp.ones(3))


@jax.jit
def _pulled(weight, gradient):
    model = {"a": weight, "ternary": jnp.ones((3, 8)), "bias": jnp.ones(3)}
    rules = [Rule("a", NM(2, 4)), Rule("ternary", Ternary())]
    prepared, _ = prepare_qat(model, rules)
    params = eqx.filter(prepared, eqx.is_inexact_array)
    gradients = eqx.tree_at(lambda m: m["a"].weight, params, gradient)
    pull = sr_ste(0.125)
    updates: Any = pull.update(gradients, pull.init(params), params)[0]
    return updates["a"].weight, updates["bias"]


def test_sr_ste_brings_what_is_left_out_to_zero():
    """With a gradient of zero and plain steps they shrink by a factor each."""
    weight = random((4, 8))
    params, _ = prepare_qat({"w": weight}, [Rule("w", NM(2, 4))])
    optimizer = optax.chain(sr_ste(0.5), optax.sgd(0.5))
    rows = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape)), params)
    params, _ = jax.jit(functools.partial(trained, optimizer))(params, rows)
    factor = np.where(nm_mask(np.asarray(weight), 2, 4), 1, 0.75**3)
    np.testing.assert_allclose(params["w"].weight, weight * factor, rtol=1e-6)


@pytest.mark.errors
def test_refusals():
    params, rules = {"w": jnp.ones((4, 8))}, [Rule("w", NM(2, 4))]
    inner = optax.sgd(0.1)
    for alpha in (0.0, -0.1, 1.5, float("nan")):
        with refused("`alpha`"):
            rigl(inner, rules, alpha, t_end=10)
    function: Any
    for function in (rigl, functools.partial(set_training, key=jax.random.key(0))):
        for wrong in ({"delta_t": 0}, {"t_end": 0}, {"t_end": 2.5}):
            with refused(f"`{next(iter(wrong))}`"):
                function(inner, rules, **({"t_end": 10} | wrong))
    with refused("`end`", "10"):
        magnitude_pruning(inner, rules, begin=10, end=10)
    with refused("`begin`"):
        magnitude_pruning(inner, rules, begin=-1, end=10)
    optimizer = rigl(inner, rules, t_end=10)
    with refused("rigl", "'w'", "matches no weight"):
        optimizer.init({"v": jnp.ones((4, 8))})
    packed, _ = quantize(params, rules)
    with refused("rigl", "'w'", "SparseArray", "dequantize"):
        optimizer.init(packed)
    with refused("rigl", "groups of 4", "6 inputs"):
        optimizer.init({"w": jnp.ones((4, 6))})
    with refused("rigl", "`params`", "optimizer.update"):
        optimizer.update(params, optimizer.init(params))
    with refused("sparse_masks", "rigl"):
        sparse_masks(inner.init(params))
    with refused("`weight_decay`"):
        sr_ste(-1.0)
    with refused("sr_ste", "prepare_qat"):
        sr_ste().init(params)
    prepared, _ = prepare_qat(params, rules)
    with refused("sr_ste", "`params`"):
        sr_ste().update(prepared, optax.EmptyState())
