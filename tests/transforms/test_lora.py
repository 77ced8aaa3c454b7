"""Adapters on models: what they are put on, what learns, dropout, every transform."""

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
from support.lora_oracle import adapter_of, moved_adapters, whole
from support.tolerances import as_wide, assert_close

from capibara_eqx.arrays import LoRAArray
from capibara_eqx.layers import Attention, Embedding, Linear, MoE, SwiGLU
from capibara_eqx.models import Stack, TransformerBlock
from capibara_eqx.transforms import (
    Affine,
    LoRA,
    Rule,
    Ternary,
    attention_rules,
    convert,
    dequantize,
    lora,
    prepare_qat,
    quantize,
    report,
    trainable_spec,
    with_dropout_key,
)


KEY = jax.random.key(0)
seeds = st.integers(0, 2**16)
SPECS = [LoRA(2), LoRA(3, alpha=7, rs=True), LoRA(1, dora=True)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def net(seed: int = 0) -> dict[str, Any]:
    """Two maps, one of Equinox; weights from NumPy, so that little is compiled."""
    first = eqx.filter_eval_shape(lambda: Linear(7, 5, key=KEY))
    second = eqx.filter_eval_shape(lambda: eqx.nn.Linear(5, 3, key=KEY))
    rng = np.random.default_rng(seed)
    fill = lambda leaf: (  # noqa: E731
        jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else leaf
    )
    return jax.tree.map(fill, {"first": first, "second": second})


@eqx.filter_jit
def run(model, x):
    return jax.vmap(model["second"])(jax.nn.silu(model["first"](x)))


adapt = eqx.filter_jit(lambda model, rules, key: lora(model, rules, key=key)[0])
EVERY = {spec: [Rule(".*weight", spec)] for spec in SPECS}


@functools.cache
def adapted(spec: LoRA, small: bool) -> Any:
    """The model with adapters, over four bits a weight if it is small."""
    model = net()
    if small:
        model, _ = quantize(model, [Rule(".*weight", Affine(4, group_size=3))])
    return adapt(model, EVERY[spec], KEY)


@settings(max_examples=50)
@given(spec=st.sampled_from(SPECS), seed=seeds)
def test_a_new_adapter_changes_nothing(spec, seed):
    model = net(seed)
    new = adapt(model, EVERY[spec], jax.random.key(seed))
    x = normal(seed + 1, 4, 7)
    want = run(model, x)
    if not spec.dora:
        np.testing.assert_array_equal(run(new, x), want)
    assert_close(run(new, x), want, dtype="float32", length=7)
    limit = 1 / np.sqrt(7)
    a = np.asarray(new["first"].weight.a)
    assert np.all(np.abs(a) <= limit)
    assert np.ptp(a) > 0


@settings(max_examples=50)
@given(alpha=st.floats(0.25, 8), rs=st.booleans(), seed=seeds)
def test_the_update_is_linear_in_alpha_and_of_low_rank(alpha, rs, seed):
    parts = normal(seed, 6, 9), normal(seed + 1, 2, 9), normal(seed + 2, 6, 2)
    node = LoRAArray(*parts, LoRA(2, rs=rs))
    scaled = LoRAArray(*parts, LoRA(2, alpha=alpha, rs=rs))
    one, other = as_wide(node.update()), as_wide(scaled.update())
    assert_close(other, one * alpha / 2, dtype="float32", length=2)
    singular = np.linalg.svd(other, compute_uv=False)
    assert np.all(singular[2:] <= 1e-6 * singular[0])
    assert singular[1] > 1e-3 * singular[0]


@settings(max_examples=50)
@given(case=st.sampled_from([(SPECS[0], True), (SPECS[2], False)]), seed=seeds)
def test_only_adapters_have_gradients(case, seed):
    model = moved_adapters(adapted(*case), seed)
    learns, rest = eqx.partition(model, trainable_spec(model))
    grads = gradients(learns, rest, normal(seed + 1, 4, 7))
    for layer, grad in zip(model.values(), grads.values(), strict=True):
        assert jax.tree.leaves(grad.weight.base) == []
        assert grad.bias is None
        parts = grad.weight.adapter
        assert len(parts) == len(layer.weight.adapter)
        for part in parts:
            assert np.all(np.isfinite(part))
            assert np.max(np.abs(part)) > 0


@eqx.filter_jit
def gradients(learns, rest, x):
    return jax.grad(lambda p: jnp.sum(run(eqx.combine(p, rest), x) ** 2))(learns)


def test_a_step_of_training_moves_adapters_alone():
    model = adapted(SPECS[0], True)
    learns, rest = eqx.partition(model, trainable_spec(model))
    optimizer = optax.sgd(0.1)
    state = optimizer.init(learns)
    updates, _ = optimizer.update(gradients(learns, rest, normal(0, 4, 7)), state)
    after = eqx.combine(eqx.apply_updates(learns, updates), rest)
    for name in model:
        old, new = model[name].weight, after[name].weight
        assert eqx.tree_equal(old.base, new.base)
        assert not np.array_equal(old.b, new.b)


def test_what_else_learns():
    model = adapted(SPECS[0], False)
    mask = trainable_spec(model, ["first/bias", "second/.*"])
    assert mask["first"].bias
    assert not mask["first"].weight.base
    assert mask["second"].bias
    assert mask["second"].weight.base
    assert mask["first"].weight.b
    assert not mask["first"].weight.inference
    assert trainable_spec(net())["first"].weight is True


def test_quantize_before_and_after_is_the_same():
    """The codes are those of the weight alone; the report has one entry for both."""
    rules = [Rule(".*weight", Affine(4, group_size=3))]
    before = adapted(SPECS[0], True)
    after, found = quantize(adapted(SPECS[0], False), rules)
    assert eqx.tree_equal(before["first"].weight.base, after["first"].weight.base)
    entry = found.entries[0]
    assert entry.path == "first/weight"
    assert entry.scheme == "LoRA r2 over int4 g3"
    # Four bits a weight in whole bytes a row, steps of three; the adapter in float32.
    assert entry.nbytes == 5 * 4 + 5 * 3 * 4 + 4 * (2 * 7 + 5 * 2)
    assert entry.original_bytes == 4 * 5 * 7
    again, _ = quantize(after, rules)
    assert eqx.tree_equal(again, after)
    plain = dequantize(after)
    assert jax.tree.structure(plain) == jax.tree.structure(adapted(SPECS[0], False))
    x = normal(0, 4, 7)
    assert_close(run(plain, x), run(after, x), dtype="float32", length=12)


def test_the_report_knows_adapters_over_plain_arrays():
    model = moved_adapters(adapted(SPECS[2], False), 0)
    found = report(model, net())
    assert [e.scheme for e in found.entries] == ["DoRA r1 over float32"] * 2
    assert [path for path, _, _ in found.left_alone] == ["first/bias", "second/bias"]
    weight = as_wide(net()["first"].weight)
    error = weight - whole(adapter_of(model["first"].weight))
    want = 10 * np.log10(np.sum(weight**2) / np.sum(error**2))
    sqnr = found.entries[0].sqnr
    assert sqnr is not None
    assert abs(float(sqnr) - want) < 1e-3


def test_fake_codes_under_an_adapter_end_as_codes():
    fake, _ = prepare_qat(adapted(SPECS[0], False), [Rule("first/.*t", Ternary())])
    assert report(fake).entries[0].scheme == "LoRA r2 over fake ternary"
    small = convert(fake)
    assert report(small).entries[0].scheme == "LoRA r2 over ternary"
    x = normal(0, 4, 7)
    assert_close(run(small, x), run(fake, x), dtype="float32", length=12)


def test_an_adapter_that_is_there_stays():
    model = adapted(SPECS[0], False)
    again, _ = lora(model, EVERY[SPECS[0]], key=jax.random.key(5))
    assert eqx.tree_equal(again, model)


def attention_names(model) -> list[str]:
    _, found = lora(model, attention_rules(LoRA(1), "qo"), key=KEY)
    return [entry.path for entry in found.entries]


def test_maps_of_any_attention():
    ours = eqx.filter_eval_shape(lambda: Attention(4, 2, key=KEY))
    theirs = eqx.filter_eval_shape(lambda: eqx.nn.MultiheadAttention(2, 4, key=KEY))
    zeros = lambda leaf: (  # noqa: E731
        jnp.zeros(leaf.shape) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    )
    ours, theirs = jax.tree.map(zeros, (ours, theirs))
    assert attention_names(ours) == ["q_proj/weight", "o_proj/weight"]
    assert attention_names([theirs]) == ["0/query_proj/weight", "0/output_proj/weight"]


def test_a_table_of_embeddings():
    table = Embedding(6, 5, key=KEY)
    table, _ = lora(table, [Rule("weight", LoRA(2))], key=KEY)
    table = moved_adapters(table, 0)
    matrix = whole(adapter_of(table.weight))
    tokens = jnp.array([[3, 0], [5, 3]])
    assert_close(table(tokens), matrix[np.asarray(tokens)], dtype="float32", length=4)
    x = normal(1, 2, 5)
    want = as_wide(x) @ matrix.T
    assert_close(table.attend(x), want, dtype="float32", length=8)


@pytest.mark.slow
def test_experts_have_one_adapter_each():
    layer = MoE(4, 3, 2, 5, key=KEY)
    model, _ = lora(layer, [Rule("gate|down", LoRA(2))], key=KEY)
    assert model.gate.a.shape == (3, 2, 4)
    model = moved_adapters(model, 0)
    written = [whole(adapter_of(w)) for w in (model.gate, model.down)]
    plain = eqx.tree_at(
        lambda m: (m.gate, m.down), layer, [jnp.asarray(w, "float32") for w in written]
    )
    x = normal(1, 7, 4)
    call = eqx.filter_jit(lambda layer, x: layer(x)[0])
    assert_close(call(model, x), call(plain, x), dtype="float32", length=20)


def test_a_convolution():
    conv = eqx.nn.Conv1d(2, 4, 3, key=KEY)
    model, found = lora(conv, [Rule("weight", LoRA(2))], key=KEY)
    assert found.entries[0].shape == (4, 6)
    model = moved_adapters(model, 0)
    weight = whole(adapter_of(model.matrix)).reshape(4, 2, 3)
    x = normal(1, 2, 9)
    assert conv.bias is not None
    want = as_wide(conv.bias) + np.stack(
        [np.einsum("oit,it->o", weight, as_wide(x)[:, i : i + 3]) for i in range(7)], 1
    )
    assert_close(model(x), want, dtype="float32", length=8)


def test_dropout_has_a_key_of_its_own_everywhere():
    model = {"a": Linear(7, 5, key=KEY), "b": Linear(7, 5, key=KEY)}
    rules = [Rule("a/weight", LoRA(2, dropout=0.5)), Rule("b/weight", LoRA(2))]
    model, _ = lora(model, rules, key=KEY)
    keyed = with_dropout_key(model, jax.random.key(1))
    assert keyed["b"].weight.key is None
    assert keyed["a"].weight.key is not None
    twice, _ = lora(
        {"a": Linear(7, 5, key=KEY), "b": Linear(7, 5, key=KEY)},
        [Rule(".*weight", LoRA(2, dropout=0.5))],
        key=KEY,
    )
    one, other = [layer.weight.key for layer in with_dropout_key(twice, KEY).values()]
    assert not jnp.array_equal(jax.random.key_data(one), jax.random.key_data(other))
    plain = net()
    assert with_dropout_key(plain, KEY) is plain


def test_rows_drop_other_inputs_by_keys_of_their_own():
    layer, _ = lora(
        eqx.nn.Linear(40, 3, key=KEY), [Rule("weight", LoRA(2, dropout=0.5))], key=KEY
    )
    layer = moved_adapters(layer, 0)
    x = jnp.broadcast_to(normal(0, 40), (2, 40))

    @eqx.filter_jit
    def both(layer, x, keys):
        shared = jax.vmap(with_dropout_key(layer, keys[0]))(x)
        own = jax.vmap(lambda x, k: with_dropout_key(layer, k)(x))(x, keys)
        return shared, own

    shared, own = both(layer, x, jax.random.split(KEY, 2))
    assert_close(shared[0], shared[1], dtype="float32", length=40)
    assert np.max(np.abs(own[0] - own[1])) > 0.1


def blocks(count: int) -> list[TransformerBlock]:
    return [
        TransformerBlock(Attention(4, 2, key=k), SwiGLU(4, 5, key=k), 4)
        for k in jax.random.split(KEY, count)
    ]


@pytest.mark.slow
def test_a_scanned_stack_is_its_layers_one_by_one():
    """Values, and gradients under `jit`, `scan` and `checkpoint`; with dropout too."""
    rules = [Rule(".*proj/weight", LoRA(2, dropout=0.5, dora=True))]
    scanned, _ = lora(Stack(blocks(2), scan=True, remat="full"), rules, key=KEY)
    scanned = with_dropout_key(moved_adapters(scanned, 0), jax.random.key(1))
    arrays, static = eqx.partition(scanned.blocks, eqx.is_array)
    layers = [
        eqx.combine(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), static)
        for i in range(2)
    ]
    listed = eqx.tree_at(lambda s: s.blocks, Stack(blocks(2)), tuple(layers))
    x = normal(1, 3, 4)

    @eqx.filter_jit
    def both(stack, x):
        learns, rest = eqx.partition(stack, trainable_spec(stack))

        def loss(learns):
            y, _ = eqx.combine(learns, rest)(x)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(learns)

    grads, y = both(scanned, x)
    grads_listed, y_listed = both(listed, x)
    assert_close(y, y_listed, dtype="float32", length=50)
    parts = [jax.tree.leaves(block) for block in grads_listed.blocks]
    for leaf, *of_layers in zip(jax.tree.leaves(grads), *parts, strict=True):
        assert_close(leaf, np.stack(of_layers), dtype="float32", length=50, terms=1)


def test_models_side_by_side():
    """Adapters made under `vmap`, one model an ensemble's member."""

    @eqx.filter_jit
    def ensemble(x, keys):
        def member(key):
            return lora(Linear(7, 5, key=key), [Rule("weight", LoRA(2))], key=key)[0]

        models = eqx.filter_vmap(member)(keys)
        axes = (eqx.if_array(0), None)
        return models, eqx.filter_vmap(lambda m, x: m(x), in_axes=axes)(models, x)

    models, y = ensemble(normal(0, 3, 7), jax.random.split(KEY, 2))
    assert models.weight.a.shape == (2, 2, 7)
    want = np.einsum(
        "ki,moi->mko", as_wide(normal(0, 3, 7)), as_wide(models.weight.base)
    )
    assert_close(y, want + as_wide(models.bias)[:, None], dtype="float32", length=8)


def test_adapters_are_serialised():
    model = moved_adapters(adapted(SPECS[0], True), 3)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    read = eqx.tree_deserialise_leaves(file, adapted(SPECS[0], True))
    assert eqx.tree_equal(read, model)
