"""Stacks of blocks: listed, scanned, with rematerialisation, with reports."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from support.model_oracle import moved, stack_row
from support.numpy_oracles import rms_norm
from support.tolerances import assert_close

from capibara_eqx.layers import (
    AbstractAux,
    AbstractSequenceMixer,
    Conv1DBlock,
    Mamba,
)
from capibara_eqx.models import ResidualBlock, Stack, aux_losses


D, SEQ = 3, 5
IDS = np.asarray([0, 0, -1, 4, 4], "int32")


class Report(AbstractAux):
    power: Float[Array, ""]
    count: Array

    def losses(self):
        return {"power": self.power, "twice": 2 * self.power}


class Gain(AbstractSequenceMixer):
    """Scales its input, reports the power of what came out."""

    gain: Float[Array, " d_model"]

    def __call__(self, x, *, segment_ids=None, key=None):
        y = x * jnp.broadcast_to(self.gain.astype(x.dtype), x.shape)
        return y, Report(jnp.mean(y**2), jnp.asarray(x.shape[-2]))

    def init_cache(self, batch_shape=(), *, max_len=None):
        return jnp.zeros((*batch_shape, 1))

    def prefill(self, x, cache, *, segment_ids=None):
        return self(x)[0], cache

    def step(self, x, cache):
        return self(x[..., None, :])[0][..., 0, :], cache


def mamba_blocks(count, dropout=0.0):
    keys = jax.random.split(jax.random.key(0), count)
    blocks = [
        ResidualBlock(Mamba(D, 2, 2, key=key), D, dropout=dropout) for key in keys
    ]
    return [moved(block, i) for i, block in enumerate(blocks)]


@functools.cache
def pair(dropout=0.0):
    """The same two blocks as a list and scanned."""
    blocks = mamba_blocks(2, dropout)
    return Stack(blocks), Stack(blocks, scan=True)


def random(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, "float32")


@functools.cache
def jit(function) -> Any:
    return eqx.filter_jit(function)


def call(stack, x):
    return stack(x)


def gradients(stack, x, key=None):
    """Value and gradients in all parameters and in the input."""

    def loss(both):
        stack, x = both
        return jnp.sum(stack(x, segment_ids=jnp.asarray(IDS), key=key)[0] ** 2)

    return eqx.filter_value_and_grad(loss)((stack, x))


def close(got, want, terms=50):
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(left, right, dtype="float32", length=terms)


def stacked(trees):
    """A tuple of trees as one tree with a leading layer axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def equations(function, *args):
    """Number of equations in the program of `function`, inner ones included."""

    def inner(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def count(jaxpr):
        total = len(jaxpr.eqns)
        for eqn in jaxpr.eqns:
            for value in jax.tree.leaves(eqn.params, is_leaf=inner):
                if inner(value):
                    total += count(getattr(value, "jaxpr", value))
        return total

    return count(eqx.filter_make_jaxpr(function)(*args)[0].jaxpr)


@pytest.mark.parametrize("index", [0, 1], ids=["list", "scanned"])
def test_values_are_those_of_the_loops(index):
    stack, x = pair()[index], random(SEQ, D)
    y, _ = jit(call)(stack, x)
    close(y, stack_row(stack, np.asarray(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_scanned_is_listed_with_its_gradients(dropout):
    listed, scanned = pair(dropout)
    x, key = random(SEQ, D), jax.random.key(5) if dropout else None
    value, (got, got_x) = jit(gradients)(scanned, x, key)
    want_value, (want, want_x) = jit(gradients)(listed, x, key)
    close((value, got_x), (want_value, want_x))
    close(got.blocks, stacked(want.blocks))
    if dropout:
        other, _ = jit(gradients)(scanned, x, jax.random.key(6))
        assert abs(float(other) - float(value)) > 1e-3


def test_scanned_is_listed_with_its_caches():
    def read(stack, x, x_next):
        cache = stack.init_cache((2,))
        ids = jnp.broadcast_to(jnp.asarray(IDS), (2, SEQ))
        y, cache = stack.prefill(x, cache, segment_ids=ids)
        y_next, after = stack.step(x_next, cache)
        return (y, y_next), cache, after

    x, x_next = random(2, SEQ, D), random(2, D, seed=1)
    listed, scanned = pair()
    outputs, *caches = jit(read)(scanned, x, x_next)
    want_outputs, *want_caches = jit(read)(listed, x, x_next)
    close(outputs, want_outputs)
    close(caches, [stacked(cache) for cache in want_caches])
    assert jax.tree.structure(caches[0]) == jax.tree.structure(want_caches[0][0])


def test_blocks_of_different_kinds_run_in_their_order():
    first, second = mamba_blocks(2)
    conv = ResidualBlock(Conv1DBlock(D, D, 2, key=jax.random.key(9)), D)
    x = random(SEQ, D)
    y, aux = jit(call)(Stack([first, conv, second]), x)
    middle, _ = conv(jnp.asarray(stack_row(Stack([first]), np.asarray(x)), "float32"))
    close(y, stack_row(Stack([second]), np.asarray(middle)))
    assert aux == (None, None, None)
    cache = Stack([first, conv, second]).init_cache()
    kinds = [type(part).__name__ for part in cache]
    assert kinds == ["MambaCache", "Conv1DCache", "MambaCache"]


def test_the_program_of_a_scanned_stack_does_not_grow():
    x, x_next = random(SEQ, D), random(D)

    def read(stack, x):
        return stack.prefill(x, stack.init_cache(), segment_ids=jnp.asarray(IDS))

    def step(stack, x_next):
        return stack.step(x_next, stack.init_cache())

    def sizes(count, scan):
        stack = Stack(mamba_blocks(count), scan=scan)
        functions = [(call, x), (gradients, x), (read, x), (step, x_next)]
        return [equations(function, stack, arg) for function, arg in functions]

    assert sizes(8, scan=True) == sizes(2, scan=True)
    for small, large in zip(sizes(2, scan=False), sizes(4, scan=False), strict=True):
        assert large > 1.5 * small


def test_the_caches_of_a_scanned_stack_travel_in_the_carry():
    stack = pair()[1]
    jaxpr = jax.make_jaxpr(lambda x: stack.step(x, stack.init_cache()))(random(D))
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    (loop,) = [eqn for eqn in loops if eqn.params["length"] == 2]
    # Nothing is stacked up: all results are the last carry, and they hold the cache.
    of_one_layer = [aval.shape for aval in loop.params["jaxpr"].out_avals]
    assert [variable.aval.shape for variable in loop.outvars] == of_one_layer
    carried = {variable.aval.shape for variable in loop.outvars}
    for leaf in jax.tree.leaves(stack.init_cache()):
        assert leaf.shape in carried


EVERYTHING = jax.checkpoint_policies.everything_saveable


@pytest.mark.parametrize("scan", [False, True], ids=["list", "scanned"])
def test_rematerialisation_keeps_less(scan):
    def kept(remat):
        """Bytes that the forward pass keeps: the leaves of its pullback."""
        stack = Stack(mamba_blocks(2), scan=scan, remat=remat)
        arrays, static = eqx.partition(stack, eqx.is_array)

        def outputs(arrays, x):
            return eqx.combine(arrays, static)(x)[0]

        def pullback(arrays, x):
            return jax.vjp(outputs, arrays, x)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, arrays, random(SEQ, D)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert kept("full") < kept("dots") < min(kept(None), kept(EVERYTHING))


@pytest.mark.parametrize(
    ("scan", "remat"), [(True, "full"), (False, "dots"), (True, EVERYTHING)]
)
def test_rematerialisation_changes_nothing(scan, remat):
    x = random(SEQ, D)
    stack = Stack(mamba_blocks(2), scan=scan, remat=remat)
    value, (got, got_x) = jit(gradients)(stack, x)
    want_value, (want, want_x) = jit(gradients)(pair()[int(scan)], x)
    close((value, got_x), (want_value, want_x))
    close(got.blocks, want.blocks)


@pytest.mark.parametrize("scan", [False, True])
def test_reports_reach_the_top(scan):
    gains = [jnp.full((D,), 0.5), jnp.full((D,), 2.0)]
    blocks = [ResidualBlock(Gain(gain), D) for gain in gains]
    stack = Stack(blocks, scan=scan)
    x = random(2, SEQ, D)
    y, aux = jit(call)(stack, x)
    powers, want = [], np.asarray(x, "float64")
    for block, gain in zip(blocks, gains, strict=True):
        out = rms_norm(want, np.asarray(block.norm.weight)) * float(gain[0])
        powers.append(np.mean(out**2))
        want = want + out
    close(y, want)
    assert [type(report) for report in aux] == [Report, Report]
    close([report.power for report in aux], powers)
    assert [int(report.count) for report in aux] == [SEQ, SEQ]
    losses = aux_losses(aux)
    assert set(losses) == {"power", "twice"}
    close(losses, {"power": sum(powers), "twice": 2 * sum(powers)})

    def gradient(stack, x):
        return eqx.filter_grad(lambda s: aux_losses(s(x)[1])["power"])(stack)

    for leaf in jax.tree.leaves(jit(gradient)(stack, x).blocks):
        assert np.any(leaf != 0)


def test_losses_of_no_report_one_report_and_narrow_reports():
    assert aux_losses(None) == {}
    assert aux_losses((None, {"other": jnp.ones(3)})) == {}
    one = Report(jnp.asarray(1.5), jnp.asarray(1))
    narrow = Report(jnp.asarray(0.5, "bfloat16"), jnp.asarray(1))
    assert float(aux_losses(one)["power"]) == 1.5
    losses = aux_losses({"a": [one], "b": (narrow, None)})
    assert {name: float(loss) for name, loss in losses.items()} == {
        "power": 2.0,
        "twice": 4.0,
    }
