"""Weights whose inputs one given step rounds: packed, in training, and stacked."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import packed_oracle as oracle
from support.messages import refused
from support.quant_cases import IN, OUT, compiled, random, seeds, weight_of, wide
from support.tolerances import assert_close

from capibara_eqx.arrays import (
    NM,
    Affine,
    FakeQuantArray,
    Ternary,
    apply_weight,
    compress,
    recompress,
)


STATIC = "static_int8"
SPECS = {
    "int8": Affine(8, activations=STATIC),
    "int4 g3": Affine(4, group_size=3, activations=STATIC),
    "int3 asymmetric": Affine(3, symmetric=False, activations=STATIC),
    "int4 learned": Affine(4, learned_step=True, activations=STATIC),
    "ternary": Ternary(activations=STATIC),
    "ternary base3": Ternary(packing="base3", activations=STATIC),
}
# Inputs are of the size of one: a part of them is clipped. By a power of two nothing is
# rounded before whole numbers are: no two ways to round a tie.
STEP = jnp.asarray(2.0**-7, jnp.float32)
# The others run with the slow tests; the products are of all.
QUICK = ("int4 g3", "ternary")
names = pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SPECS],
)


@eqx.filter_jit
def product(node, x):
    return apply_weight(node, x)


@eqx.filter_jit
def training(weight, spec, step):
    return FakeQuantArray.of(weight, spec, step)


@settings(max_examples=60)
@given(seed=seeds, name=st.sampled_from([*SPECS]))
def test_products_are_those_of_the_loop_in_training_too(seed, name):
    weight = jnp.asarray(weight_of(seed, power=0))
    packed = compiled()(weight, SPECS[name], STEP)
    fake = training(weight, SPECS[name], STEP)
    x = random((4, IN), seed).at[0, 0].set(2.0)
    seen, inside = oracle.round_by_one_step(x, STEP)
    assert not inside.all()
    matrix = wide(packed.dense())
    size = np.max(np.abs(matrix)) * np.max(np.abs(seen))
    close = {"dtype": "float32", "length": IN, "terms": size}
    assert_close(product(packed, x), seen @ matrix.T, **close)
    assert_close(product(fake, x), product(packed, x), **close)


@names
def test_gradients_reach_what_is_not_clipped(name):
    x, cotangent = random((4, IN), 1), random((4, OUT), 2)
    weight = jnp.asarray(weight_of(0, power=0))
    seen, inside = oracle.round_by_one_step(x, STEP)

    @eqx.filter_jit
    def pulled(node, x):
        return jax.vjp(apply_weight, node, x)[1](cotangent)

    for node in (
        training(weight, SPECS[name], STEP),
        compiled()(weight, SPECS[name], STEP),
    ):
        of_node, of_x = pulled(node, x)
        want = np.where(inside, wide(cotangent) @ wide(node.dense()), 0)
        assert_close(of_x, want, dtype="float32", length=OUT)
        assert of_node.input_scale == 0
    fake = training(weight, SPECS[name], STEP)
    if fake.step is None:
        want = wide(cotangent).T @ seen
        assert_close(pulled(fake, x)[0].weight, want, dtype="float32", length=4)


@names
def test_a_stack_is_its_matrices(name):
    """Under `vmap` and `scan`, with a step each; and what is made of either form."""
    stack = jnp.asarray(np.stack([weight_of(5 * i, power=0) for i in range(3)]))
    steps = STEP * jnp.arange(1, 4, dtype=jnp.float32)
    x = random((4, IN), 3)
    packed = compiled()(stack, SPECS[name], steps)
    fake = training(stack, SPECS[name], steps)
    assert packed.shape == fake.shape == (3, OUT, IN)
    assert eqx.tree_equal(compiled()(fake, SPECS[name]), packed)
    single = [compiled()(stack[i], SPECS[name], steps[i]) for i in range(3)]
    want = np.stack([product(node, x) for node in single])

    @eqx.filter_jit
    def both(nodes, x):
        step = lambda x, node: (x, apply_weight(node, x))
        mapped = eqx.filter_vmap(apply_weight, in_axes=(eqx.if_array(0), None))
        return mapped(nodes, x), jax.lax.scan(jax.checkpoint(step), x, nodes)[1]

    for nodes in (packed, fake):
        for got in both(nodes, x):
            assert_close(got, want, dtype="float32", length=IN, terms=10.0)
    for i, node in enumerate(single):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], packed)
        assert eqx.tree_equal(own, node)


@names
def test_it_stays_when_the_weight_is_another(name):
    packed = compiled()(jnp.asarray(weight_of(0, power=0)), SPECS[name], STEP)
    again = recompress(packed.dense(), packed)
    assert eqx.tree_equal(again, packed)
    fake = training(packed.dense(), SPECS[name], STEP)
    other = recompress(2 * packed.dense(), fake)
    assert isinstance(other, FakeQuantArray)
    assert other.input_scale == STEP
    # It takes as many bytes as its dtype says, and rows have no use for it.
    plain = compiled()(
        packed.dense(), dataclasses.replace(SPECS[name], activations=None)
    )
    assert packed.nbytes == plain.nbytes + 4
    np.testing.assert_array_equal(
        packed[jnp.asarray([2, 0])], wide(packed.dense())[[2, 0]]
    )
    assert str(packed.spec).endswith("a8 static")


@pytest.mark.parametrize("kind", ["packed", "training"])
def test_bfloat16_inputs(kind):
    weight = jnp.asarray(weight_of(0, power=0), "bfloat16")
    make = compiled() if kind == "packed" else training
    node = make(weight, SPECS["int8"], STEP)
    x = random((4, IN), 1, "bfloat16")
    seen, _ = oracle.round_by_one_step(x, STEP)
    y = product(node, x)
    assert y.dtype == "bfloat16"
    matrix = wide(node.astype("float32").dense())
    assert_close(y, seen @ matrix.T, dtype="bfloat16", length=1)


@pytest.mark.errors
def test_a_step_too_many_or_too_few_or_of_another_shape():
    weight = random((2, OUT, IN))
    static, plain = SPECS["int8"], Affine(8)
    for make in (compress, FakeQuantArray.of):
        with refused("`input_scale`", "calibrate", "int8 a8 static"):
            make(weight, static)
        with refused("`input_scale`", "nothing else", "(2,)", "int8"):
            make(weight, plain, jnp.ones(2))
        with refused("`input_scale`", "(2,)", "()"):
            make(weight, static, jnp.ones(()))
        with refused("`input_scale`", "2:4"):
            make(random((2, 4, 8)), NM(2, 4), jnp.ones(2))
    with refused("activations", "static_int8", "'static'"):
        Affine(8, activations="static")
    with refused("activations", "static_int8", "'static'"):
        Ternary(activations="static")
