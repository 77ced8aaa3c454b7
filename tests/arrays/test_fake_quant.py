"""Weights in training: the values of the compressed ones, the derivatives of others."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import quant_oracle as oracle
from support.quant_cases import (
    IN,
    OUT,
    QUICK,
    SPECS,
    compiled,
    names,
    random,
    seeds,
    weight_of,
    wide,
)
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.arrays import Affine, FakeQuantArray, Ternary


EPS = EPSILONS["float32"]
close = functools.partial(assert_close, dtype="float32", length=IN)


@functools.cache
def dense() -> Any:
    return eqx.filter_jit(lambda node: node.dense())


@functools.cache
def product() -> Any:
    return eqx.filter_jit(lambda node, x: node @ x)


@functools.cache
def pulled_back() -> Any:
    """The cotangents of the node and of the input for one of the product."""

    @eqx.filter_jit
    def pull(node, x, g):
        return eqx.filter_vjp(lambda node, x: node @ x, node, x)[1](g)

    return pull


def fake(weight, spec) -> Any:
    """With learned steps that training has moved a little, one of them below zero."""
    node: Any = FakeQuantArray.of(jnp.asarray(weight), spec)
    if node.step is None:
        return node
    factors = np.linspace(0.6, 1.1, node.step.size).reshape(node.step.shape)
    factors.flat[0] = -0.8
    step = node.step * jnp.asarray(factors, node.step.dtype)
    return eqx.tree_at(lambda node: node.step, node, step)


@settings(max_examples=120)
@given(name=st.sampled_from(list(SPECS)), seed=seeds)
def test_training_computes_what_the_converted_weight_does(name, seed):
    node = fake(weight_of(seed), SPECS[name])
    packed = compiled()(node, SPECS[name])
    np.testing.assert_array_equal(dense()(node), packed.dense())
    x = random((IN,), seed)
    want = wide(product()(packed, x))
    size = np.max(np.abs(wide(packed.dense()))) * np.max(np.abs(wide(x)))
    close(product()(node, x), want, terms=size)


@names
def test_batches_and_bfloat16(name):
    weight = jnp.asarray(weight_of(0, power=0), "bfloat16")
    node = fake(weight, SPECS[name])
    packed = compiled()(node, SPECS[name])
    assert node.dtype == packed.dtype == "bfloat16"
    np.testing.assert_array_equal(dense()(node), packed.dense())
    for dtype in ("bfloat16", "float32"):
        x = random((IN, 4), dtype=dtype)
        y = product()(node, x)
        assert y.dtype == dtype
        assert_close(y, product()(packed, x), dtype=dtype, length=IN)


@names
def test_gradients_pass_through_the_rounding(name):
    """dx = W_q^T g, and dW = g x_q^T where the rounding lets it through."""
    spec = SPECS[name]
    weight, x, g = weight_of(0, power=0), random((IN,)), random((OUT,), 1)
    node = fake(weight, spec)
    of_node, of_x = pulled_back()(node, x, g)
    rounded = wide(dense()(node))
    close(of_x, rounded.T @ wide(g))
    seen = oracle.round_tokens(x) if spec.activations else wide(x)
    want = np.outer(wide(g), seen)
    passes = np.ones((OUT, IN), bool)
    if spec.learned_step:
        step = np.abs(np.repeat(wide(node.step), spec_width(spec), 1)[:, :IN])
        low, high = (-1, 1) if isinstance(spec, Ternary) else spec.limits
        ratio = wide(weight) / step
        passes = (ratio > low) & (ratio < high)
        assert not np.all(passes)
    elif isinstance(spec, Affine) and spec.calibration != "minmax":
        scale = np.repeat(wide(compiled()(node, spec).scale), spec_width(spec), 1)
        low, high = spec.limits
        ratio = wide(weight) / scale[:, :IN]
        passes = (ratio > low - 0.5) & (ratio < high + 0.5)
    close(of_node.weight, np.where(passes, want, 0))


def spec_width(spec) -> int:
    return getattr(spec, "group_size", None) or IN


@settings(max_examples=50)
@given(
    seed=seeds,
    name=st.sampled_from(QUICK),
    rows=st.lists(st.booleans(), min_size=OUT, max_size=OUT),
)
def test_gradients_of_zeros_are_finite_and_pass(seed, name, rows):
    """Whole rows of zeros, all of them too, learn as if nothing were rounded."""
    weight = np.where(np.array(rows)[:, None], 0, weight_of(seed, power=0))
    node = fake(weight.astype(np.float32), SPECS[name])
    x, g = random((IN,), seed), random((OUT,), seed)
    of_node, of_x = pulled_back()(node, x, g)
    leaves = [of_x, *jax.tree.leaves(of_node)]
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    seen = oracle.round_tokens(x) if SPECS[name].activations else wide(x)
    # A zero is within every range.
    got, want = wide(of_node.weight), np.outer(wide(g), seen)
    size = np.max(np.abs(want))
    assert np.all(np.abs(got - want)[rows] <= 1e-6 * size)


@names
def test_gradients_are_those_of_the_converted_weight_for_the_input(name):
    node = fake(weight_of(0, power=0), SPECS[name])
    packed = compiled()(node, SPECS[name])
    x, g = random((IN,)), random((OUT,), 1)
    close(pulled_back()(node, x, g)[1], pulled_back()(packed, x, g)[1])


@settings(max_examples=50)
@given(
    seed=seeds,
    gradient=st.sampled_from(["clipped", "identity"]),
    share=st.sampled_from([60.0, 100.0]),
)
def test_what_lies_beyond_the_range_has_no_gradient(seed, gradient, share):
    """One beyond the last code by half a step still rounds to it."""
    spec = Affine(4, calibration="percentile", percentile=share, gradient=gradient)
    weight = weight_of(seed)
    of_node, _ = pulled_back()(fake(weight, spec), jnp.ones(IN), jnp.ones(OUT))
    got = wide(of_node.weight)
    assert set(np.unique(got)) <= {0.0, 1.0}
    if gradient == "identity":
        assert np.all(got == 1)
        return
    scale = wide(compiled()(jnp.asarray(weight), spec).scale)
    ratio = wide(weight) / scale
    low, high = spec.limits
    sure = (np.abs(ratio - (low - 0.5)) > 0.02) & (np.abs(ratio - (high + 0.5)) > 0.02)
    inside = (ratio > low - 0.5) & (ratio < high + 0.5)
    np.testing.assert_array_equal(got[sure], inside[sure])


LEARNED = [
    Affine(4, learned_step=True),
    Affine(4, range="full", learned_step=True, group_size=3),
    Affine(3, learned_step=True, granularity="tensor"),
    Ternary(scale="learned"),
]


@pytest.mark.parametrize("spec", LEARNED, ids=str)
@settings(max_examples=50)
@given(seed=seeds)
def test_learned_steps_have_the_gradients_of_the_paper(spec, seed):
    """The last group of 3 in 7 holds one value: its own step learns faster."""
    weight = weight_of(seed, power=0)
    node = fake(weight, spec)
    g = random((OUT, IN), seed + 1)
    got = of_dense()(node, g)
    low, high = (-1, 1) if isinstance(spec, Ternary) else spec.limits
    assert node.step is not None
    whole = node.step.size == 1
    steps = np.abs(wide(node.step)).ravel()
    cut = [oracle.groups(part, spec_width(spec), whole) for part in (weight, g)]
    of_weight = oracle.groups(got.weight, spec_width(spec), whole)
    of_step = wide(got.step).ravel() * np.sign(wide(node.step)).ravel()
    for values, cotangent, step, dw, ds in zip(
        *cut, steps, of_weight, of_step, strict=True
    ):
        through, slope, factor = oracle.learned_step_gradients(
            values, step, low, high, high
        )
        ratio = np.abs(values / step)
        near = np.minimum(np.abs(ratio % 1 - 0.5), np.abs(ratio - high)) < 1e-4
        if np.any(near | (np.abs(ratio + low) < 1e-4)):
            continue
        close(dw, through * cotangent)
        terms = float(np.sum(np.abs(slope * cotangent)) + np.sum(np.abs(ratio)) * EPS)
        close(ds, np.sum(slope * cotangent) * factor, terms=terms)


@functools.cache
def of_dense() -> Any:
    @eqx.filter_jit
    def pull(node, g):
        return eqx.filter_grad(lambda node: jnp.sum(node.dense() * g))(node)

    return pull


@names
def test_gradients_of_zero_weights_and_inputs_are_finite(name):
    node = FakeQuantArray.of(jnp.zeros((OUT, IN)), SPECS[name])
    for x in (jnp.zeros(IN), random((IN,))):
        assert np.all(wide(product()(node, x)) == 0)
        grads = pulled_back()(node, x, random((OUT,), 1))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["int4 g3", "int8 learned a8", "ternary a8"])
def test_second_derivatives(name):
    """Those of tanh(W x) summed, at the rounded weight and input, as if not rounded."""
    node = fake(weight_of(0, power=0), SPECS[name])
    x, v = random((IN,)), random((IN,), 2)

    def loss(node, x):
        return jnp.sum(jnp.tanh(node @ x))

    @eqx.filter_jit
    def twice(node, x):
        slope = lambda node, x: jnp.vdot(jax.grad(loss, argnums=1)(node, x), v)
        return eqx.filter_grad(slope)(node, x), jax.grad(slope, argnums=1)(node, x)

    of_node, of_x = twice(node, x)
    W = wide(dense()(node))
    seen = oracle.round_tokens(x) if SPECS[name].activations else wide(x)
    y = np.tanh(W @ seen)
    first, second = 1 - y**2, -2 * y * (1 - y**2)
    want = W.T @ (second * (W @ wide(v)))
    assert_close(of_x, want, dtype="float32", length=OUT * IN)
    # d/dW of v . W^T (1 - y^2)
    want = np.outer(second * (W @ wide(v)), seen) + np.outer(first, wide(v))
    if not SPECS[name].learned_step:
        assert_close(of_node.weight, want, dtype="float32", length=OUT * IN)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(of_node))


@settings(max_examples=50)
@given(seed=seeds, name=st.sampled_from([n for n in SPECS if n.endswith("a8")]))
def test_whole_numbers_are_rounded_floats(seed, name):
    """The sums of 32 bits times the steps, against both roundings in float64."""
    packed = compiled()(jnp.asarray(weight_of(seed, power=0)), SPECS[name])
    x = random((IN,), seed)
    seen = oracle.round_tokens(x)
    size = np.max(np.abs(wide(packed.dense())) @ np.abs(seen))
    close(product()(packed, x), wide(packed.dense()) @ seen, terms=size)
