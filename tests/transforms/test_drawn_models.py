"""What holds of compressing any model, of models that are drawn.

Depth, width, container, dtype and forms are drawn, from so few that little compiles.
"""

import functools
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import packed_oracle as oracle
from support.quant_cases import bytes_of, seeds, wide
from support.tolerances import assert_close

from capibara_eqx.arrays import is_weight
from capibara_eqx.layers import Linear
from capibara_eqx.transforms import (
    Affine,
    Rule,
    Ternary,
    convert,
    dequantize,
    prepare_qat,
    quantize,
)


SPECS = [
    Affine(4, group_size=3),
    Affine(3, symmetric=False),
    Affine(8, activations="int8"),
    Ternary(packing="base3"),
]
# Depth and width, or width, dtype and axes in front: a few of each.
towers = st.sampled_from([(1, 4), (3, 7)])
layouts = st.sampled_from([(4, "float32", ()), (7, "bfloat16", (3,))])
HEADER = 128  # bytes in front of every array of a file


@functools.cache
def shapes_of(kind: type, width: int) -> Any:
    return eqx.filter_eval_shape(
        lambda key: kind(width, width, key=key), jax.random.key(0)
    )


def layer_of(rng, kind, width, stack=(), dtype="float32"):
    """A layer, or a stack of them, with numbers from NumPy: nothing is compiled."""

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.asarray(rng.standard_normal((*stack, *leaf.shape)), dtype)

    return jax.tree.map(fill, shapes_of(kind, width))


def rules(spec):
    return [Rule(r".*weight", spec)]


def take(model, index):
    """One layer of a stack, by NumPy: JAX compiles every index."""
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(np.asarray(leaf)[index]) if eqx.is_array(leaf) else leaf
        ),
        model,
    )


def same(tree, other) -> bool:
    """Structures, dtypes and every bit."""
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.shape(a) == np.shape(b)
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(leaves, others, strict=True)
    )


# Property 10: stacks, and what runs them.


@functools.cache
def compressed(spec):
    """Under `jit`: of a stack at once, and of its layers under `vmap`."""
    whole = lambda model: quantize(model, rules(spec))[0]
    return eqx.filter_jit(lambda stack: (whole(stack), eqx.filter_vmap(whole)(stack)))


@eqx.filter_jit
def outputs(stack, x):
    """Of a scan, of one that is checkpointed, and of every layer alone by `vmap`."""
    step = lambda x, layer: (jnp.tanh(layer(x)), None)
    return (
        jax.lax.scan(step, x, stack)[0],
        jax.lax.scan(jax.checkpoint(step), x, stack)[0],
        eqx.filter_vmap(lambda layer: layer(x))(stack),
    )


def layer_by_hand(layer, x, spec):
    if spec.activations == "int8":
        x = oracle.round_tokens(x)
    return x @ wide(layer.weight.dense()).T + wide(layer.bias)


@settings(max_examples=50)
@given(seed=seeds, tower=towers, spec=st.sampled_from([SPECS[0], *SPECS[2:]]))
@pytest.mark.slow
def test_a_stack_is_its_layers_whatever_runs_it(seed, tower, spec):
    rng, (depth, width) = np.random.default_rng(seed), tower
    stack = layer_of(rng, Linear, width, (depth,))
    small, _ = quantize(stack, rules(spec))
    assert all(same(other, small) for other in compressed(spec)(stack))
    layers = [quantize(take(stack, i), rules(spec))[0] for i in range(depth)]
    assert all(same(take(small, i), layer) for i, layer in enumerate(layers))
    fake, _ = prepare_qat(stack, rules(spec))
    assert same(convert(fake), small)
    # Inputs that are whole numbers of steps: there are no two ways to round them.
    x = rng.integers(-127, 128, (5, width))
    x[:, 0] = 127
    x = np.float32(x / 64)
    scanned, checkpointed, alone = outputs(small, x)
    close = {"dtype": "float32", "length": width, "terms": 10.0}
    assert_close(checkpointed, scanned, **close)
    for i, layer in enumerate(layers):
        assert_close(alone[i], layer_by_hand(layer, wide(x), spec), **close)
    y = wide(x)
    for layer in layers:
        y = np.tanh(layer_by_hand(layer, y, spec))
    if spec.activations is None or depth == 1:
        # Errors are passed on by every layer, as large as its weights are.
        assert_close(scanned, y, **(close | {"terms": 10.0 * (2 * width) ** depth}))


# Property 11: structures.


@st.composite
def trees(draw):
    """A model of layers of ours and of Equinox in containers."""
    rng = np.random.default_rng(draw(seeds))
    width, dtype, stack = draw(layouts)

    def layer(kind):
        return layer_of(rng, kind, width, stack, dtype)

    kinds = st.sampled_from([Linear, eqx.nn.Linear])
    inner = st.recursive(
        kinds.map(layer),
        lambda x: (
            st.lists(x, min_size=1, max_size=2)
            | st.lists(x, min_size=1, max_size=2).map(tuple)
            | st.dictionaries(st.sampled_from("ab"), x, min_size=1)
        ),
        max_leaves=4,
    )
    extra = [jnp.asarray(rng.standard_normal(3), dtype), "name", None, 7]
    return {"model": draw(inner), "extra": extra}


def stripped(model):
    """Without weights: what stands there is one leaf."""
    nodes = lambda node: is_weight(node) or isinstance(node, Linear | eqx.nn.Linear)

    def strip(node):
        if isinstance(node, Linear | eqx.nn.Linear):
            return eqx.tree_at(lambda layer: layer.weight, node, 0)
        return node

    return jax.tree.map(strip, model, is_leaf=nodes)


@settings(max_examples=50)
@given(model=trees(), spec=st.sampled_from(SPECS[:3]), share=st.booleans())
@pytest.mark.slow
def test_only_weights_change_and_all_of_them_come_back(model, spec, share):
    chosen = rules(spec)
    if share:
        # Only what comes first, if there is more than one.
        first = quantize(model, chosen)[1].entries[0].path
        chosen = [Rule(first, spec)]
    for make in (quantize, prepare_qat):
        small, found = make(model, chosen)
        assert len(found.entries) == 1 or not share
        if not share:
            assert same(stripped(small), stripped(model))
        untouched = {path for path, _, _ in found.left_alone}
        assert untouched.isdisjoint(entry.path for entry in found.entries)
        back = dequantize(small)
        assert jax.tree.structure(back) == jax.tree.structure(model)
        pairs = zip(jax.tree.leaves(model), jax.tree.leaves(back), strict=True)
        for old, new in pairs:
            if eqx.is_array(old):
                assert (old.shape, old.dtype) == (new.shape, new.dtype)
            else:
                assert old == new
        assert back["extra"][0] is model["extra"][0]
        with pytest.raises(ValueError, match="'no such path' matches no weight"):
            make(model, [*chosen, Rule("no such path", spec)])


# Properties 12 and 20: files and bytes.


@settings(max_examples=50)
@given(model=trees(), spec=st.sampled_from([*SPECS[:2], SPECS[3]]))
def test_a_file_is_as_long_as_the_formula_and_read_to_the_bit(model, spec):
    small, found = quantize(model, rules(spec))
    want = {entry.path: bytes_of(spec, entry.shape) for entry in found.entries}
    for entry in found.entries:
        assert entry.nbytes == want[entry.path]
        assert entry.bits_per_weight == 8 * want[entry.path] / np.prod(entry.shape)
    kept = eqx.filter(small, eqx.is_array)
    others = sum(nbytes for _, _, nbytes in found.left_alone)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, kept)
    arrays = len(jax.tree.leaves(kept))
    assert len(file.getvalue()) == sum(want.values()) + others + HEADER * arrays
    file.seek(0)
    # Into what was made of other numbers.
    other = jax.tree.map(jnp.zeros_like, kept)
    assert same(eqx.tree_deserialise_leaves(file, other), kept)
