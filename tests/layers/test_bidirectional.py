"""Two mixers, one from each end, merged by hand in NumPy."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from support import numpy_oracles as oracles
from support.attention_oracle import affine
from support.derivatives import check_first_order
from support.layer_cases import LENGTH, packed_rows, seeds
from support.mamba_oracle import mamba_row, parameters
from support.messages import refused
from support.numpy_oracles import documents, wide
from support.quick import filled
from support.small_layers import bidirectional
from support.tolerances import assert_close

from capibara_eqx.layers import (
    AbstractSequenceMixer,
    Attention,
    Bidirectional,
    Conv1DBlock,
    Mamba,
)


KEY = jax.random.key(0)
each_merge = pytest.mark.parametrize("merge", ["sum", "concatenation", "gate"])


@functools.cache
def layer_of(merge):
    def build(*, key):
        return Bidirectional(
            Mamba(3, 2, d_conv=2, key=key),
            Mamba(3, 1, d_conv=3, key=key),
            3,
            merge,
            key=key,
        )

    return filled(build, seed=0, size=0.5)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


@eqx.filter_jit
def call(layer, x, ids=None, key=None):
    return layer(x, segment_ids=ids, key=key)


def merged(layer, x, f, r):
    if layer.out_proj is not None:
        return affine(layer.out_proj, np.concatenate([f, r], axis=-1))
    if layer.gate is not None:
        g = 1 / (1 + np.exp(-affine(layer.gate, x)))
        return g * f + (1 - g) * r
    return f + r


def by_loops(layer, x):
    """One document."""
    x = wide(x)
    f = mamba_row(parameters(layer.forward), x)[0]
    r = mamba_row(parameters(layer.reverse), x[::-1])[0][::-1]
    return merged(layer, x, f, r)


@each_merge
@given(row=packed_rows, seed=seeds)
@example(row=[-1, 4, -1, 4, 6, -1], seed=1)
@example(row=[5, 2, 2, 5, 5, 9], seed=2)
@example(row=[-1] * LENGTH, seed=3)
def test_documents_are_those_of_the_loops_and_padding_is_zero(merge, row, seed):
    layer, x = layer_of(merge), random((LENGTH, 3), seed)
    ids = jnp.asarray(row, "int32")
    y = np.asarray(call(layer, jnp.where(ids[:, None] < 0, jnp.nan, x), ids))
    for positions in documents(np.asarray(row)):
        want = by_loops(layer, np.asarray(x)[positions])
        assert_close(y[positions], want, dtype="float32", length=60)
    assert not np.any(y[np.asarray(row) < 0])


def test_batches_of_packed_rows_are_rows():
    layer, x = layer_of("gate"), random((2, 2, LENGTH, 3), 1)
    ids = np.random.default_rng(2).integers(-1, 3, (2, 2, LENGTH)).astype("int32")
    got = call(layer, x, ids)
    for row in np.ndindex(2, 2):
        want = call(layer, x[row], ids[row])
        assert_close(got[row], want, dtype="float32", length=60)


def test_one_mixer_both_ways_does_not_know_the_direction():
    mixer = layer_of("sum").forward
    layer, x = Bidirectional(mixer, mixer, 3, key=KEY), random((LENGTH, 3), 3)
    y, flipped = call(layer, x), call(layer, x[::-1])
    assert_close(flipped[::-1], y, dtype="float32", length=20)
    palindrome = jnp.concatenate([x[:3], x[2::-1]])
    y = call(layer, palindrome)
    assert_close(y[::-1], y, dtype="float32", length=20)
    # Two mixers do.
    y, flipped = (call(layer_of("sum"), x) for x in (x, x[::-1]))
    assert np.any(np.abs(flipped[::-1] - y) > 1e-2)


@pytest.mark.parametrize("at", [0, LENGTH - 1])
def test_every_token_sees_the_whole_row(at):
    x = random((LENGTH, 3), 4)
    before, after = (call(layer_of("sum"), x) for x in (x, x.at[at].add(1.0)))
    assert np.all(np.any(before != after, axis=-1))


def test_merges_differ():
    x = random((LENGTH, 3), 5)
    first, *others = (
        call(layer_of(name), x) for name in ("sum", "concatenation", "gate")
    )
    for other in others:
        assert np.all(np.any(np.abs(first - other) > 1e-3, axis=-1))


def test_it_cannot_be_streamed():
    layer = layer_of("sum")
    assert not isinstance(layer, AbstractSequenceMixer)
    for method in ("init_cache", "prefill", "step"):
        assert not hasattr(layer, method)


def test_each_direction_has_a_key_of_its_own():
    mixer = filled(Attention, 4, 1, dropout_p=0.5, seed=0, size=0.5)
    layer = Bidirectional(mixer, mixer, 4, key=KEY)
    half = random((3, 4), 6)
    palindrome = jnp.concatenate([half, half[::-1]])
    y = [call(layer, palindrome, None, jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(y[0], y[1])
    assert np.any(y[0] != y[2])
    assert np.any(np.abs(y[0] - y[0][::-1]) > 1e-3)


@each_merge
def test_derivatives(merge):
    def build(*, key):
        f, r = (Conv1DBlock(2, 2, k, activation=None, key=key) for k in (2, 3))
        return Bidirectional(f, r, 2, merge, key=key)

    layer = filled(build, seed=7, size=1.0)
    fields = {"f": lambda m: m.forward.weight, "r": lambda m: m.reverse.weight}
    if merge != "sum":
        name = {"concatenation": "out_proj", "gate": "gate"}[merge]
        fields["merge"] = lambda m: getattr(m, name).weight
    point = {name: np.asarray(at(layer), "float64") for name, at in fields.items()}
    point["x"] = np.random.default_rng(8).standard_normal((4, 2))
    weights = np.random.default_rng(9).standard_normal((4, 2))

    def moved(values):
        return eqx.tree_at(
            lambda m: [at(m) for at in fields.values()],
            layer,
            [values[name] for name in fields],
        )

    def loss(arrays):
        return jnp.sum(weights * moved(arrays)(arrays["x"]) ** 2)

    def oracle(point):
        x = point["x"]
        f, _ = oracles.causal_conv(x, point["f"], np.asarray(layer.forward.bias))
        r, _ = oracles.causal_conv(x[::-1], point["r"], np.asarray(layer.reverse.bias))
        return float(np.sum(weights * merged(moved(point), x, f, r[::-1]) ** 2))

    check_first_order(loss, oracle, point)


@pytest.mark.errors
def test_bad_arguments():
    conv: Any = filled(Conv1DBlock, 3, 3, 2, seed=0, size=0.5)
    with refused("`d_model`", "positive integer"):
        Bidirectional(conv, conv, 0, key=KEY)
    with refused("`merge`", "'sum', 'concatenation', 'gate'", "Did you mean 'gate'"):
        Bidirectional(conv, conv, 3, "gated", key=KEY)
    wider: Any = filled(Conv1DBlock, 3, 4, 2, seed=0, size=0.5)
    for pair, name in (((wider, conv), "forward"), ((conv, wider), "reverse")):
        layer = Bidirectional(*pair, 3, key=KEY)
        with refused(f"Bidirectional: `{name}`", "(2, 3)", "(2, 4)"):
            layer(random((2, 3)))


@pytest.mark.errors
def test_directions_that_are_no_mixers_of_the_width():
    conv: Any = filled(Conv1DBlock, 3, 3, 2, seed=0, size=0.5)
    both, narrow = layer_of("sum"), filled(Mamba, 2, 2, seed=0, size=0.5)
    for bad, words in (
        (both, ["sequence mixer", "got Bidirectional"]),
        (narrow, ["d_model=3", "Mamba of d_model=2"]),
    ):
        with refused("Bidirectional: `forward`", *words):
            Bidirectional(bad, conv, 3, key=KEY)
        with refused("Bidirectional: `reverse`", *words):
            Bidirectional(conv, bad, 3, key=KEY)


@pytest.mark.errors
def test_inputs_that_do_not_fit():
    layer = filled(bidirectional, seed=0, size=0.5)
    with refused("Bidirectional: `x`", "3 elements", "(2, 4)"):
        layer(random((2, 4)))
    with refused("Bidirectional: `x`", "sequence"):
        layer(random((3,)))
    with refused("`segment_ids`", "(2,)", "(3,)"):
        layer(random((2, 3)), segment_ids=jnp.zeros((3,), "int32"))
