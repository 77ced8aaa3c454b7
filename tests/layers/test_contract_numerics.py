"""What every layer owes beyond its values: files, traces, dtypes, gradients."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support.layer_cases import (
    LENGTH,
    ROOM,
    call,
    compiled,
    each,
    floats,
    fresh,
    inputs,
    layer_of,
    prefill,
    run,
    seeds,
    step,
)
from support.tolerances import assert_close

from capibara_eqx.layers import Embedding
from capibara_eqx.models import LanguageModel


# Padding in front, inside a document, and behind.
IDS = np.asarray([-1, 0, -1, 0, 2, -1], "int32")


def energy(y):
    return jnp.sum(jnp.square(y.astype("float32")))


def gradients(layer, x, ids=None):
    """The loss, and its gradients in all parameters and in the input."""

    def loss(both):
        layer, x = both
        return energy(call(layer, x, ids))

    return eqx.filter_value_and_grad(loss)((layer, x))


def valid_gradients(layer, x, ids):
    """As `gradients`, in the parameters, of a loss that leaves padding out."""

    def loss(layer):
        y = call(layer, x, ids)
        return energy(jnp.where(ids[:, None] >= 0, y, jnp.zeros_like(y)))

    return eqx.filter_value_and_grad(loss)(layer)


def through_the_cache(layer, cache, x):
    """Gradients of the outputs in the cache; of the new cache in layer and input."""

    def outputs(remembered):
        return energy(layer.prefill(x, eqx.combine(remembered, cache))[0])

    def new_cache(both):
        layer, x = both
        leaves = jax.tree.leaves(floats(layer.prefill(x, cache)[1]))
        return sum(energy(leaf) for leaf in leaves)

    return jax.grad(outputs)(floats(cache)), eqx.filter_grad(new_cache)((layer, x))


def read_and_store(layer, x, ids):
    cache = layer.init_cache(ids.shape[:-1], max_len=ROOM)
    return prefill(layer, x, cache, ids)


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array_like))


def in_bfloat16(case, layer, x):
    """The layer and an input whose values flow in bfloat16."""
    if not case.tokens:
        return layer, x.astype("bfloat16")
    return eqx.tree_at(_table, layer, replace_fn=lambda w: w.astype("bfloat16")), x


def _table(layer):
    layer = layer.embedding if isinstance(layer, LanguageModel) else layer
    return layer.weight if isinstance(layer, Embedding) else layer.table.weight


def widened(tree):
    """bfloat16 leaves as the float32 numbers they are."""
    return jax.tree.map(
        lambda leaf: leaf.astype("float32") if eqx.is_inexact_array(leaf) else leaf,
        tree,
    )


@each()
def test_a_file_brings_the_layer_back(case):
    layer, other = layer_of(case), layer_of(case, seed=1)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, layer)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, eqx.filter_eval_shape(lambda: other))
    assert jax.tree.structure(restored) == jax.tree.structure(layer)
    for left, right in zip(arrays(restored), arrays(layer), strict=True):
        np.testing.assert_array_equal(left, right)
    x = inputs(case, case.shape, 0)
    got, want = compiled(case, call).run(restored, x), run(case, call, x)
    np.testing.assert_array_equal(got, want)


@each("mixer")
def test_a_file_brings_the_cache_back(case):
    x = inputs(case, (LENGTH,), 0)
    _, cache = run(case, prefill, x, fresh(case))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, cache)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, fresh(case))
    got, want = run(case, step, x[0], restored), run(case, step, x[0], cache)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(left, right)


@each()
def test_one_trace_a_shape_whatever_the_values(case):
    for function in (call, prefill, step):
        compiled(case, function).traces.clear()
    for seed in (0, 1):
        layer = layer_of(case, seed)
        x = inputs(case, case.shape, seed)
        compiled(case, call).run(layer, x)
        if case.mixer:
            cache = layer.init_cache(max_len=4 * LENGTH + 2)
            for _ in range(2):
                _, cache = compiled(case, prefill).run(layer, x, cache)
                _, cache = compiled(case, step).run(layer, x[0], cache)
            for ids in ([0] * LENGTH, [-1, 5, 5, 7, -1, 5]):
                ids = jnp.asarray(ids, "int32")
                compiled(case, prefill).run(layer, x, cache, ids)
    for function in (call, prefill, step):
        counts = compiled(case, function).traces
        assert set(counts.values()) <= {1}, counts


@each()
@given(seed=seeds)
def test_bfloat16_in_bfloat16_out(case, seed):
    layer, x = in_bfloat16(case, layer_of(case), inputs(case, case.shape, seed))
    function, rest = (read_and_store, (IDS,)) if case.mixer else (call, ())
    got = compiled(case, function).run(layer, x, *rest)
    want = compiled(case, function).run(widened(layer), widened(x), *rest)
    if case.mixer:
        (got, cache), (want, _) = got, want
        assert {leaf.dtype.name for leaf in arrays(cache)} <= {"float32"}
    assert got.dtype == jnp.bfloat16
    length = case.roundings or (16 if case.mixer else 2)
    valid = IDS >= 0 if case.mixer else slice(None)
    assert_close(
        got.astype("float32")[valid],
        want[valid],
        dtype="bfloat16",
        length=length,
        factor=2.0,
    )


@each()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_and_constants_have_finite_values_and_gradients(case, dtype):
    layer, shape = layer_of(case), case.shape
    constants = (0, 6) if case.tokens else (0.0, 1.0, -30.0)
    for constant in constants:
        x = jnp.full_like(inputs(case, shape, 0), constant)
        if dtype == "bfloat16":
            layer, x = in_bfloat16(case, layer, x)
        # Padding as well, in one of the dtypes.
        ids = jnp.asarray(IDS) if case.mixer and dtype == "float32" else None
        value, gradient = compiled(case, gradients).run(layer, x, ids)
        assert np.isfinite(value)
        for leaf in arrays(gradient):
            assert np.all(np.isfinite(leaf.astype("float32")))


@each()
def test_every_parameter_has_a_gradient(case):
    x = inputs(case, case.shape, 0)
    ids = jnp.asarray(IDS) if case.mixer else None
    _, (gradient, _) = compiled(case, gradients).run(layer_of(case), x, ids)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        moves = bool(np.any(np.asarray(leaf) != 0))
        assert moves == (not name.endswith(case.fitted)), name


@each("mixer")
def test_what_stands_at_padding_reaches_no_gradient(case):
    """NaN times a gradient of zero would be NaN: padding is left out on the way in."""
    x, ids = inputs(case, (LENGTH,), 0), jnp.asarray(IDS)
    padding = ids < 0 if case.tokens else ids[:, None] < 0
    nothing = jnp.asarray(-1 if case.tokens else jnp.nan, x.dtype)
    run = compiled(case, valid_gradients).run
    _, want = run(layer_of(case), x, ids)
    value, got = run(layer_of(case), jnp.where(padding, nothing, x), ids)
    assert np.isfinite(value)
    for got_leaf, want_leaf in zip(arrays(got), arrays(want), strict=True):
        np.testing.assert_array_equal(got_leaf, want_leaf)


@each("memory")
def test_gradients_pass_into_and_out_of_the_cache(case):
    _, cache = run(case, prefill, inputs(case, (LENGTH,), 0), fresh(case))
    into, out_of = run(case, through_the_cache, cache, inputs(case, (2,), 1))
    for path, leaf in jax.tree.leaves_with_path(into):
        assert leaf.size == 0 or np.any(leaf != 0), (
            f"outputs do not see cache{jax.tree_util.keystr(path)}"
        )
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(out_of))
    for leaf in jax.tree.leaves((into, out_of)):
        assert np.all(np.isfinite(leaf))
