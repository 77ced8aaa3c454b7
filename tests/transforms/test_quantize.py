"""Compressing models of Equinox and ours: values, structure, and back again."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quant_cases import random, weight_of, wide
from support.quant_models import (
    MODELS,
    SPECS,
    call_of,
    close_trees,
    gradient_of,
    model_of,
    nodes_of,
    rules,
    small_of,
    x_of,
)
from support.tolerances import assert_close

from capibara_eqx.arrays import AffineArray, FakeQuantArray
from capibara_eqx.layers import CompressedConv, Linear
from capibara_eqx.transforms import (
    Affine,
    Rule,
    Ternary,
    convert,
    dequantize,
    prepare_qat,
    quantize,
    trainable_spec,
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# A node in a layer, nodes in a tree, a layer put for another, and stacked ones.
QUICK = ("mlp", "conv2d", "our embedding", "experts")
models = pytest.mark.parametrize(
    "name", [name if name in QUICK else slow(name) for name in MODELS]
)
GRID = SPECS["int4 g3"]


@models
@pytest.mark.parametrize(
    "spec", [GRID, slow(SPECS["int8"]), slow(SPECS["ternary"])], ids=str
)
def test_it_computes_with_the_rounded_weights_and_goes_back(name, spec):
    model, small = model_of(name), small_of(name, spec)
    plain = dequantize(small)
    assert len(nodes_of(small)) > 0
    got, x = call_of(name)(small, x_of(name)), x_of(name)
    close_trees(got, call_of(name)(plain, x))
    before = call_of(name)(model, x)
    off = np.max(np.abs(wide(got) - wide(before))) / np.max(np.abs(wide(before)))
    assert 0 < off < (0.05 if spec == SPECS["int8"] else 2)
    assert jax.tree.structure(plain) == jax.tree.structure(model)
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True)
    for old, new in pairs:
        if eqx.is_array(old):
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert eqx.tree_equal(dequantize(plain), plain)


@models
def test_the_same_again_changes_nothing(name):
    small = small_of(name, GRID)
    again, found = quantize(small, rules(GRID))
    assert eqx.tree_equal(again, small)
    assert all(entry.sqnr is None for entry in found.entries)
    fake, _ = prepare_qat(model_of(name), rules(GRID))
    again, _ = prepare_qat(fake, rules(GRID))
    assert eqx.tree_equal(again, fake)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    spec=st.sampled_from([*SPECS.values(), Affine(3, symmetric=False)]),
)
def test_whatever_the_weights_quantizing_twice_is_quantizing_once(seed, spec):
    model = {"a": jnp.asarray(weight_of(seed)), "b": [jnp.ones(3)]}
    small, _ = quantize(model, [Rule("a", spec)])
    again, _ = quantize(small, [Rule("a", spec)])
    assert eqx.tree_equal(small, again)
    back = dequantize(small)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert back["b"][0] is model["b"][0]


TRAINED = [GRID, slow(Affine(8, activations="int8")), slow(Ternary(scale="learned"))]


@models
@pytest.mark.parametrize("spec", TRAINED, ids=str)
def test_training_computes_what_the_converted_model_does(name, spec):
    model, x = model_of(name), x_of(name)
    fake, _ = prepare_qat(model, rules(spec))
    small = convert(fake)
    assert not any(isinstance(node, FakeQuantArray) for node in nodes_of(small))
    assert len(nodes_of(small)) == len(nodes_of(fake)) > 0
    close_trees(call_of(name)(fake, x), call_of(name)(small, x))
    assert eqx.tree_equal(small, small_of(name, spec))
    # Undone it keeps the values that it computed with.
    close_trees(dequantize(fake), dequantize(small))


@models
@pytest.mark.slow
def test_gradients_of_training_reach_every_parameter(name):
    """Those of the same model with the rounded weights as plain arrays."""
    fake, _ = prepare_qat(model_of(name), rules(Affine(8)))
    got, want = [gradient_of(name)(m, x_of(name)) for m in (fake, dequantize(fake))]
    close_trees(got, want)
    assert all(np.any(wide(leaf) != 0) for leaf in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["mlp", slow("gru"), slow("conv2d")])
def test_second_derivatives_in_training(name):
    """Those of the model with the rounded weights as plain arrays."""
    fake, _ = prepare_qat(model_of(name), rules(Affine(8)))
    call, x = MODELS[name][1], x_of(name)

    def slope(model):
        gradient = eqx.filter_grad(lambda m: jnp.sum(jnp.sin(call(m, x))))(model)
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

    twice = eqx.filter_jit(eqx.filter_grad(slope))
    close_trees(twice(fake), twice(dequantize(fake)), length=1000)


@pytest.mark.parametrize(
    "name", ["mlp", "gru", *map(slow, ["attention", "conv1d", "our linear"])]
)
@pytest.mark.slow
def test_an_ensemble_before_or_after(name):
    """Quantized before or after stacking: the same codes, under vmap and scan."""
    make, call = MODELS[name][:2]
    keys = jax.random.split(jax.random.key(1), 3)
    stack = eqx.filter_jit(eqx.filter_vmap(lambda key: make(key=key)))(keys)
    x = x_of(name)
    after, _ = quantize(stack, rules(GRID))
    small = [quantize(one(stack, i), rules(GRID))[0] for i in range(3)]
    for i in range(3):
        assert eqx.tree_equal(one(after, i), small[i])
    inside = eqx.filter_vmap(lambda model: quantize(model, rules(GRID))[0])(stack)
    assert eqx.tree_equal(after, inside)
    want = np.stack([call_of(name)(model, x) for model in small])
    batched = eqx.filter_jit(eqx.filter_vmap(call, in_axes=(eqx.if_array(0), None)))
    close_trees(batched(after, x), want)
    arrays, static = eqx.partition(after, eqx.is_array)

    @jax.jit
    def scanned(arrays):
        @jax.checkpoint
        def step(total, layer):
            y = call(eqx.combine(layer, static), x)
            return total + jnp.sum(y), y

        return jax.lax.scan(step, jnp.zeros(()), arrays)[1]

    close_trees(scanned(arrays), want)
    assert jax.tree.structure(dequantize(after)) == jax.tree.structure(stack)


def one(stack, i: int):
    """A model of a stack, by NumPy: JAX compiles every index."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf)[i]) if eqx.is_array(leaf) else leaf,
        stack,
    )


@pytest.mark.parametrize("name", ["attention", slow("transposed"), slow("experts")])
def test_checkpoint_and_jit_change_nothing(name):
    small, x, call = small_of(name, GRID), x_of(name), MODELS[name][1]

    @eqx.filter_jit
    def gradient(model, x, checkpointed):
        run = eqx.filter_checkpoint(call) if checkpointed else call
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(model, x))))(x)

    close_trees(gradient(small, x, True), gradient(small, x, False))
    compiled = eqx.filter_jit(lambda model: quantize(model, rules(GRID))[0])
    assert eqx.tree_equal(compiled(model_of(name)), small)


@models
@pytest.mark.parametrize(
    "spec", [Affine(3, symmetric=False), slow(Ternary(packing="base3"))], ids=str
)
@pytest.mark.slow
def test_a_file_holds_the_bytes_of_the_report(name, spec):
    """`tree_serialise_leaves` writes a header of 128 bytes for each array."""
    small, found = quantize(model_of(name), rules(spec))
    arrays = [leaf for leaf in jax.tree.leaves(small) if eqx.is_array(leaf)]
    only_arrays = eqx.filter(small, eqx.is_array)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, only_arrays)
    assert len(file.getvalue()) == found.nbytes + 128 * len(arrays)
    file.seek(0)
    like = eqx.filter_eval_shape(lambda: only_arrays)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, like), only_arrays)


def test_a_file_is_read_into_a_model_that_was_never_computed():
    make, spec = MODELS["mlp"][0], Affine(4, group_size=3)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, small_of("mlp", spec))
    file.seek(0)
    like = eqx.filter_eval_shape(
        lambda key: quantize(make(key=key), rules(spec))[0], jax.random.key(0)
    )
    read = eqx.tree_deserialise_leaves(file, like)
    assert eqx.tree_equal(read, small_of("mlp", spec))


def test_only_matrices_are_compressed():
    """Biases, norms and offsets that have two axes in a stack are left alone."""

    def make(key):
        return {
            "linear": Linear(4, 4, key=key),
            "norm": eqx.nn.LayerNorm(4),
            "cell": eqx.nn.GRUCell(4, 4, key=key),
        }

    keys = jax.random.split(jax.random.key(0), 3)
    stack = eqx.filter_jit(eqx.filter_vmap(make))(keys)
    small, found = quantize(stack, [Rule(".*", Affine(8))])
    paths = {entry.path for entry in found.entries}
    assert paths == {"linear/weight", "cell/weight_ih", "cell/weight_hh"}
    left = {"linear/bias", "norm/weight", "norm/bias", "cell/bias", "cell/bias_n"}
    assert {path for path, _, _ in found.left_alone} == left
    assert small["linear"].weight.scale.shape == (3, 4, 1)


def test_a_convolution_keeps_its_path_and_its_place():
    conv = eqx.nn.Sequential([model_of("conv2d"), eqx.nn.Lambda(jax.nn.relu)])
    rule = [Rule("layers/0/weight", Affine(8))]
    small, found = quantize(conv, rule)
    assert isinstance(small.layers[0], CompressedConv)
    assert [entry.path for entry in found.entries] == ["layers/0/weight"]
    assert [path for path, _, _ in found.left_alone] == ["layers/0/bias"]
    again, found = quantize(small, rule)
    assert eqx.tree_equal(again, small)
    assert [entry.path for entry in found.entries] == ["layers/0/weight"]
    assert isinstance(dequantize(small).layers[0], eqx.nn.Conv2d)
    # A row is an output channel: one step each.
    assert small.layers[0].matrix.scale.shape == (3, 1)


def test_the_first_rule_that_matches_counts():
    model = model_of("mlp")
    mixed = [
        Rule("layers/0/weight", None),
        Rule("layers/1/.*", Ternary()),
        Rule(".*weight", Affine(8)),
        Rule(".*bias", None),
    ]
    small, found = quantize(model, mixed)
    assert [entry.scheme for entry in found.entries] == ["ternary", "int8"]
    assert small.layers[0].weight is model.layers[0].weight
    assert isinstance(small.layers[2].weight, AffineArray)


def test_bare_arrays_and_containers():
    weight = random((3, 4))
    small, _ = quantize(weight, [Rule("", Affine(8))])
    np.testing.assert_array_equal(dequantize(small), small.dense())
    tree = {"a": [weight, jnp.ones(3)], "b": (weight,), "n": 3}
    small, found = quantize(tree, [Rule(".*", Affine(8))])
    assert [entry.path for entry in found.entries] == ["a/0", "b/0"]
    assert jax.tree.structure(dequantize(small)) == jax.tree.structure(tree)


@pytest.mark.parametrize("name", ["mlp", "conv1d", "our embedding", "experts"])
@pytest.mark.parametrize("spec", [Ternary(), GRID], ids=str)
@pytest.mark.slow
def test_bfloat16_models(name, spec):
    model = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16") if eqx.is_inexact_array(leaf) else leaf,
        model_of(name),
    )
    small, _ = quantize(model, rules(spec))
    scales = [x for x in jax.tree.leaves(nodes_of(small)) if eqx.is_inexact_array(x)]
    assert scales
    assert all(scale.dtype == "float32" for scale in scales)
    assert all(node.dtype == "bfloat16" for node in nodes_of(small))
    back, x = dequantize(small), x_of(name).astype("bfloat16")
    assert {leaf.dtype for leaf in nodes_and_arrays(back)} == {jnp.dtype("bfloat16")}
    y, want = call_of(name)(small, x), call_of(name)(back, x)
    assert y.dtype == want.dtype == "bfloat16"
    assert_close(y, want, dtype="bfloat16", length=10)


def nodes_and_arrays(model):
    return [leaf for leaf in jax.tree.leaves(model) if eqx.is_inexact_array(leaf)]


def test_what_learns():
    some = [Rule("layers/0/weight", Affine(4)), Rule("layers/1/weight", Ternary())]
    model, _ = quantize(model_of("mlp"), some)
    last = Rule("layers/2/weight", Affine(4, learned_step=True))
    model, _ = prepare_qat(model, [last])
    learns = trainable_spec(model)
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(eqx.filter(model, learns))
    }
    assert kept == {
        *("layers/0/bias", "layers/1/bias", "layers/2/bias"),
        *("layers/2/weight/weight", "layers/2/weight/step"),
    }
    learned, rest = eqx.partition(model, learns)

    def loss(learned):
        return jnp.sum(jnp.sin(eqx.combine(learned, rest)(jnp.ones(5))))

    gradient = eqx.filter_jit(jax.grad(loss))(learned)
    leaves = jax.tree.leaves(gradient.layers[2])
    assert len(leaves) == 3
    assert all(np.any(wide(leaf) != 0) for leaf in leaves)
