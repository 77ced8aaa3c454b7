"""Second moments of inputs, against sums over inputs that the test computes itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import GLU, MLP, Attention, MoE
from capibara_eqx.models import LanguageModel, TransformerBlock
from capibara_eqx.transforms import Affine, Rule, collect_hessian, gptq, quantize


def random(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


def moments(x):
    flat = wide(x).reshape(-1, x.shape[-1])
    return flat.T @ flat


def check(stats, path, inputs, dtype="float32"):
    inputs = wide(inputs)
    count = inputs.size // inputs.shape[-1]
    expected = moments(inputs)
    assert_close(stats.matrices[path], expected, dtype=dtype, length=count, name=path)
    assert stats.tokens[path] == count


def test_of_a_batched_layer_over_batches_of_any_shape():
    layer = filled(MLP, 3, 5, activation="relu", seed=1, size=0.7)
    batches = [random((2, 4, 3)), random((7, 3), 1), random((3,), 2)]
    stats = collect_hessian(layer, lambda layer, x: layer(x), iter(batches), [".*"])
    x = np.concatenate([wide(b).reshape(-1, 3) for b in batches])
    up = layer.up_proj
    hidden = np.maximum(x @ wide(up.weight).T + wide(up.bias), 0)
    check(stats, "up_proj/weight", x)
    check(stats, "down_proj/weight", hidden)
    assert stats.unseen == ()
    assert "16 tokens" in str(stats)


def test_of_equinox_layers_under_vmap():
    layer = filled(eqx.nn.MLP, 3, 2, 5, 1, seed=1, size=0.7)
    x = random((2, 4, 3))
    run = lambda layer, x: jax.vmap(jax.vmap(layer))(x)
    stats = collect_hessian(layer, run, [x, x], [".*weight"])
    both = np.concatenate([wide(x), wide(x)])
    first = layer.layers[0]
    check(stats, "layers/0/weight", both)
    hidden = np.maximum(both @ wide(first.weight).T + wide(first.bias), 0)
    check(stats, "layers/1/weight", hidden)


def test_of_attention_of_equinox():
    layer = filled(eqx.nn.MultiheadAttention, 2, 6, seed=2, size=0.5)
    query, key = random((3, 4, 6)), random((3, 5, 6), 1)

    def run(layer, both):
        return jax.vmap(lambda q, k: layer(q, k, k))(*both)

    stats = collect_hessian(layer, run, [(query, key)], [".*weight"])
    check(stats, "query_proj/weight", query)
    check(stats, "key_proj/weight", key)
    check(stats, "value_proj/weight", key)
    heads = lambda x, proj: (wide(x) @ wide(proj.weight).T).reshape(*x.shape[:2], 2, 3)
    q, k, v = (
        heads(query, layer.query_proj),
        heads(key, layer.key_proj),
        heads(key, layer.value_proj),
    )
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 3**0.5)
    scores = scores / scores.sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", scores, v).reshape(3, 4, 6)
    check(stats, "output_proj/weight", mixed)


def language_model(scan, remat=None):
    def make(*, key):
        blocks = [
            TransformerBlock(Attention(6, 2, key=k), GLU(6, 5, key=k), 6)
            for k in jax.random.split(key, 3)
        ]
        return LanguageModel(11, 6, blocks, scan=scan, remat=remat, key=key)

    return filled(make, seed=3, size=0.5)


def test_of_a_scanned_model_every_layer_has_its_own():
    """As the same layers one by one, whose inputs are recomputed in NumPy."""
    model = language_model(scan=True, remat="full")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))
    run = lambda model, tokens: model(tokens)
    stats = collect_hessian(model, run, [tokens], [r"stack/.*weight"])
    assert stats.matrices["stack/blocks/mixer/q_proj/weight"].shape == (3, 6, 6)
    x = wide(model.embedding.weight)[np.asarray(tokens)]
    for i in range(3):
        block = jax.tree.map(
            lambda leaf, i=i: leaf[i] if eqx.is_array(leaf) else leaf,
            model.stack.blocks,
        )
        normed = rms(x, block.mixer_norm)
        for name in ("q_proj", "k_proj", "v_proj"):
            path = f"stack/blocks/mixer/{name}/weight"
            assert_close(
                stats.matrices[path][i], moments(normed), dtype="float32", length=14
            )
            assert stats.tokens[path][i] == 14
        x = x + wide(block.mixer(jnp.asarray(normed, jnp.float32)))
        normed = rms(x, block.feed_forward_norm)
        path = "stack/blocks/feed_forward/gate_proj/weight"
        assert_close(
            stats.matrices[path][i], moments(normed), dtype="float32", length=14 * 6
        )
        x = x + wide(block.feed_forward(jnp.asarray(normed, jnp.float32)))


def rms(x, norm):
    size = np.sqrt(np.mean(x**2, -1, keepdims=True) + norm.eps)
    return x / size * wide(norm.weight)


@pytest.mark.slow
def test_of_experts_only_the_tokens_that_chose_them():
    layer = filled(MoE, 3, 4, 2, 5, use_bias=True, seed=4, size=0.8)
    x = random((2, 6, 3))
    mask = jnp.asarray(np.arange(12).reshape(2, 6) != 4)
    run = lambda layer, x: layer(x, mask=mask)
    stats = collect_hessian(layer, run, [x], [".*"])
    _, routing = layer(x, mask=mask)
    check(stats, "router/weight", np.where(np.asarray(mask)[..., None], x, 0))
    flat = wide(x).reshape(-1, 3)
    indices = np.asarray(routing.indices).reshape(-1, 2)
    for e in range(4):
        mine = flat[(indices == e).any(-1)]
        affine = lambda w, b, e=e, mine=mine: mine @ wide(w[e]).T + wide(b[e])
        gate = affine(layer.gate, layer.gate_bias)
        hidden = gate / (1 + np.exp(-gate)) * affine(layer.up, layer.up_bias)
        for path, seen in (("gate", mine), ("up", mine), ("down", hidden)):
            got = stats.matrices[path][e]
            assert_close(got, seen.T @ seen, dtype="float32", length=12 * 5)
            assert stats.tokens[path][e] == len(mine)


@pytest.mark.parametrize("scan", [False, True])
def test_the_model_computes_the_same_to_the_bit(scan):
    """Also where a zero has a sign, and under jit: the numbers only pass through."""
    model = language_model(scan)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))
    outputs = []

    def run(model, tokens):
        logits = model(tokens)
        jax.debug.callback(lambda x: outputs.append(np.asarray(x)), logits)
        return logits

    collect_hessian(model, run, [tokens], [".*weight"])
    jax.effects_barrier()
    expected = eqx.filter_jit(lambda model, tokens: model(tokens))(model, tokens)
    assert len(outputs) == 1
    np.testing.assert_array_equal(
        outputs[0].view(np.int32), np.asarray(expected).view(np.int32)
    )


def test_no_outer_product_of_a_token_is_ever_written():
    """One product of matrices adds up what a `vmap` of 64 tokens of 128 would need."""
    layer = filled(eqx.nn.Linear, 128, 3, seed=0, size=1.0)

    def collect(layer, x):
        run = lambda layer, x: jax.vmap(layer)(x)
        return collect_hessian(layer, run, [x], ["weight"]).matrices

    program = eqx.filter_jit(collect).lower(layer, random((64, 128))).compile()
    analysis = program.compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 64 * 128 * 128 * 4 / 8


def test_under_jit_it_is_the_same():
    layer = filled(MLP, 3, 5, seed=1, size=0.7)
    collect = lambda layer, x: collect_hessian(layer, lambda m, x: m(x), [x], [".*"])
    x = random((4, 3))
    plain, jitted = collect(layer, x), eqx.filter_jit(collect)(layer, x)
    for got, expected in zip(
        jax.tree.leaves(jitted), jax.tree.leaves(plain), strict=True
    ):
        assert_close(got, expected, dtype="float32", length=4)


def test_of_weights_that_are_compressed_already_and_of_narrow_ones():
    layer = filled(MLP, 4, 6, activation="relu", dtype="bfloat16", seed=1, size=0.7)
    layer, _ = quantize(layer, [Rule("up.*weight", Affine(8))])
    x = random((5, 4), dtype="bfloat16")
    stats = collect_hessian(layer, lambda layer, x: layer(x), [x], [".*"])
    check(stats, "up_proj/weight", x)
    hidden = jax.nn.relu(layer.up_proj(x))
    check(stats, "down_proj/weight", hidden)
    assert stats.matrices["down_proj/weight"].dtype == jnp.float32


class Net(eqx.Module):
    conv: eqx.nn.Conv1d
    used: eqx.nn.Linear
    unused: eqx.nn.Linear
    table: eqx.nn.Embedding

    def __call__(self, x):
        return self.used(jnp.ravel(self.conv(x)) + self.table(jnp.asarray(1)))


def test_what_no_input_reaches_is_named():
    def make(*, key):
        return Net(
            conv=eqx.nn.Conv1d(2, 3, 2, key=key),
            used=eqx.nn.Linear(12, 5, key=key),
            unused=eqx.nn.Linear(3, 5, key=key),
            table=eqx.nn.Embedding(4, 12, key=key),
        )

    net = filled(make, seed=0, size=1.0)
    rules = [Rule(".*weight", Affine(4))]
    stats = collect_hessian(
        net, lambda m, x: jax.vmap(m)(x), [random((3, 2, 5))], rules
    )
    assert set(stats.unseen) == {"conv/weight", "unused/weight", "table/weight"}
    assert stats.tokens["used/weight"] == 3
    assert "unused/weight" in str(stats)
    assert "NOT SEEN" in str(stats)
    _, found = gptq(net, stats, rules)
    flagged = {e.path for e in found.entries if e.details["fallback"]}
    assert flagged == set(stats.unseen)


def test_the_loss_that_gptq_reports_is_that_of_the_outputs():
    layer = filled(MLP, 9, 7, use_bias=False, seed=1, size=0.7)
    x = random((30, 9)) @ random((9, 9), 1)
    rules = [Rule("up.*", Affine(3))]
    stats = collect_hessian(layer, lambda layer, x: layer(x), [x], rules)
    small, found = gptq(layer, stats, rules)
    change = wide(small.up_proj.weight.dense()) - wide(layer.up_proj.weight)
    expected = np.sum((wide(x) @ change.T) ** 2)
    assert_close(
        found.entries[0].details["loss"], expected, dtype="float32", length=30 * 81
    )


@pytest.mark.errors
def test_bad_arguments():
    layer = filled(MLP, 3, 5, seed=1, size=0.7)
    run = lambda layer, x: layer(x)
    x = random((2, 3))
    with refused("batches", "none"):
        collect_hessian(layer, run, [], [".*"])
    with refused("rules", "['.*']"):
        collect_hessian(layer, run, [x], ".*")
    with refused("matches no weight", "up_proj/weight"):
        collect_hessian(layer, run, [x], ["wieght"])
    with refused("forward", "floating point"):
        collect_hessian(layer, lambda m, x: jnp.argmax(m(x)), [x], [".*"])
