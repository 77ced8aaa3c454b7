"""Language models with compressed weights: lists and stacks, streaming, sharding."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.quant_models import close_trees, nodes_of
from support.tolerances import assert_close

from capibara_eqx.models import mamba_language_model, transformer_language_model
from capibara_eqx.transforms import (
    Affine,
    Rule,
    Ternary,
    convert,
    dequantize,
    prepare_qat,
    quantize,
)


pytestmark = pytest.mark.slow


VOCAB, D, SEQ = 11, 4, 6
MAKE = {
    "mamba": functools.partial(mamba_language_model, VOCAB, D, 2, d_state=2),
    "transformer": functools.partial(
        transformer_language_model, VOCAB, D, 2, n_heads=2, d_ff=6
    ),
}
SPECS = {"int4 g3": Affine(4, group_size=3), "ternary a8": Ternary(activations="int8")}
cases = pytest.mark.parametrize("name", MAKE)
# A list of layers, and rounded tokens, run with the slow tests.
listed = pytest.param(False, marks=pytest.mark.slow, id="list")
scans = pytest.mark.parametrize("scan", [listed, pytest.param(True, id="scanned")])
specs = pytest.mark.parametrize(
    "spec", ["int4 g3", pytest.param("ternary a8", marks=pytest.mark.slow)]
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, SEQ)), "int32")


@functools.cache
def model_of(name: str, scan: bool) -> Any:
    return eqx.filter_jit(lambda key: MAKE[name](scan=scan, key=key))(jax.random.key(0))


@functools.cache
def small_of(name: str, scan: bool, spec: str) -> Any:
    return quantize(model_of(name, scan), [Rule(".*weight", SPECS[spec])])[0]


@functools.cache
def call() -> Any:
    return eqx.filter_jit(lambda model, tokens: model(tokens))


@cases
@specs
@pytest.mark.slow
def test_a_list_and_a_stack_of_layers_are_one_model(name, spec):
    """The codes of a layer do not depend on what it is stacked with."""
    listed, stacked = [small_of(name, scan, spec) for scan in (False, True)]
    blocks = [nodes_of(block) for block in listed.stack.blocks]
    whole = nodes_of(stacked.stack)
    assert [len(block) for block in blocks] == [len(whole)] * 2
    assert len(whole) > 0
    for i, block in enumerate(blocks):
        for node, stack in zip(block, whole, strict=True):
            np.testing.assert_array_equal(node.codes, np.asarray(stack.codes)[i])
    assert_close(
        call()(stacked, TOKENS), call()(listed, TOKENS), dtype="float32", length=50
    )
    back = dequantize(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(model_of(name, True))


@cases
@scans
def test_it_computes_with_the_rounded_weights(name, scan):
    small = small_of(name, scan, "int4 g3")
    got, want = [call()(m, TOKENS) for m in (small, dequantize(small))]
    assert_close(got, want, dtype="float32", length=50)
    assert np.max(np.abs(want - call()(model_of(name, scan), TOKENS))) > 1e-4


@cases
@scans
@specs
def test_streaming_is_the_call(name, scan, spec):
    """Prefill of some tokens and a step for each of the others."""
    small = small_of(name, scan, spec)
    want = call()(small, TOKENS)

    @eqx.filter_jit
    def start(model, tokens):
        return model.prefill(tokens, model.init_cache((2,), max_len=SEQ))

    step = eqx.filter_jit(lambda model, token, cache: model.step(token, cache))
    first, cache = start(small, TOKENS[:, :3])
    parts = [first]
    for i in range(3, SEQ):
        logits, cache = step(small, TOKENS[:, i], cache)
        parts.append(logits[:, None])
    # Of rounded tokens one rounding of float32 may be a step of a code.
    got = jnp.concatenate(parts, axis=1)
    if spec == "int4 g3":
        assert_close(got, want, dtype="float32", length=50)
    else:
        assert np.max(np.abs(got - want)) <= 2e-2 * np.max(np.abs(want))


@cases
@scans
@pytest.mark.slow
def test_training_and_conversion(name, scan):
    """The loss falls in a few steps, and the converted model computes the same."""
    rules = [Rule(".*weight", Affine(4, group_size=3, learned_step=True))]
    model, _ = prepare_qat(model_of(name, scan), rules)

    @eqx.filter_jit
    def step(model):
        def loss(model):
            logits = jax.nn.log_softmax(model(TOKENS[:, :-1]))
            targets = jax.nn.one_hot(TOKENS[:, 1:], VOCAB)
            return -jnp.sum(logits * targets) / (2 * (SEQ - 1))

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        return value, eqx.apply_updates(
            model, jax.tree.map(lambda leaf: -0.05 * leaf, gradient)
        )

    losses = []
    for _ in range(8):
        value, model = step(model)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.02
    small = convert(model)
    assert_close(
        call()(small, TOKENS), call()(model, TOKENS), dtype="float32", length=50
    )


@pytest.mark.slow
def test_a_compressed_model_over_several_devices():
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    small = small_of("transformer", True, "int4 g3")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    @eqx.filter_jit
    def sharded(model, tokens):
        model = eqx.filter_shard(model, whole)
        tokens = eqx.filter_shard(tokens, rows)
        return model(tokens)

    tokens = jnp.tile(TOKENS, (2, 1))
    placed = eqx.filter_shard(small, whole)
    close_trees(placed, small)
    got = sharded(placed, eqx.filter_shard(tokens, rows))
    assert_close(got, call()(small, tokens), dtype="float32", length=50)
