"""Transformer and hybrid language models against NumPy loops, full and cached."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.messages import refused
from support.model_oracle import blocks_of, moved
from support.tolerances import assert_close
from support.transformer_oracle import logits_of

from capibara_eqx.layers import (
    Attention,
    AttentionMode,
    DecoupledAttention,
    Mamba,
    MixtureOfRookies,
    MoE,
    SwiGLU,
    TokenEmbedding,
)
from capibara_eqx.models import (
    LanguageModel,
    ResidualBlock,
    TransformerBlock,
    aux_losses,
    generate,
    transformer_language_model,
)
from capibara_eqx.train import init_train_state, make_train_step


VOCAB = 11
KEY = jax.random.key(0)
call = eqx.filter_jit(lambda model, tokens: model(tokens))
prefill = eqx.filter_jit(lambda model, tokens, cache: model.prefill(tokens, cache))
step_by_one = eqx.filter_jit(lambda model, token, cache: model.step(token, cache))
report = eqx.filter_jit(
    lambda model, tokens, ids: model.forward(tokens, segment_ids=ids).aux
)


def hybrid() -> LanguageModel:
    keys = jax.random.split(KEY, 7)
    decoupled = DecoupledAttention(8, 2, None, 4, 8, window=3, key=keys[0])
    attention = Attention(8, 2, 1, rope_enabled=True, key=keys[1])
    blocks = [
        ResidualBlock(Mamba(8, 3, d_conv=2, key=keys[2]), 8),
        TransformerBlock(attention, SwiGLU(8, 12, key=keys[3]), 8),
        TransformerBlock(decoupled, MoE(8, 4, 2, 5, key=keys[4]), 8),
        ResidualBlock(attention, 8),
    ]
    return LanguageModel(VOCAB, 8, blocks, tie_embeddings=False, key=keys[5])


MODELS = {
    "llama": lambda: transformer_language_model(VOCAB, 8, 2, 4, n_kv_heads=2, key=KEY),
    "mixtral_scanned": lambda: transformer_language_model(
        VOCAB, 8, 2, 2, d_ff=6, num_experts=3, window=4, scan=True, key=KEY
    ),
    "decoupled": lambda: transformer_language_model(
        VOCAB, 8, 1, 2, mode="decoupled", sem_dim=4, geo_dim=8, key=KEY
    ),
    "hybrid": hybrid,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return moved(MODELS[request.param](), 1)


def tokens_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), "int32")


def test_logits_are_those_of_the_loops(model):
    tokens = tokens_of(2, 7)
    got = call(model, tokens)
    for row in range(2):
        want = logits_of(model, tokens[row])
        assert_close(got[row], want, dtype="float32", length=300)


def test_greedy_generation_is_the_argmax_of_the_loops(model):
    """Prompts of unequal length in one batch, caches of every kind."""
    prompt, size = tokens_of(2, 5, seed=1), 4
    ids = jnp.asarray([[-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]])
    out = generate(model, prompt, max_new_tokens=size, segment_ids=ids, temperature=0)
    for row, start in ((0, 2), (1, 0)):
        document = list(np.asarray(prompt[row, start:]))
        for token in np.asarray(out.tokens[row]):
            scores = logits_of(model, np.asarray(document))[-1]
            # The best, up to what float32 cannot tell apart.
            assert scores[token] > scores.max() - 1e-4
            document.append(token)


def test_experts_report_to_the_loss():
    model = MODELS["mixtral_scanned"]()
    tokens = tokens_of(2, 9)
    losses = aux_losses(report(model, tokens, jnp.zeros_like(tokens)))
    assert set(losses) == {"balance", "router_z"}
    # Of both layers; that of each is about 1 for a router that favours nobody.
    assert 1.5 < losses["balance"] < 2.7
    # Equal tokens go to the same experts, whose probabilities the balance then lowers.
    where = lambda m: m.stack.blocks.feed_forward.router.weight
    model = eqx.tree_at(where, model, replace_fn=lambda w: 50 * w)
    optimizer = optax.adam(0.02)
    step = make_train_step(optimizer, aux_weights={"balance": 50.0})
    state, seen = init_train_state(model, optimizer), []
    for _ in range(30):
        state, metrics = step(state, jnp.full((2, 9), 3))
        seen.append(float(metrics["balance"]))
    assert seen[0] > 2.2, seen
    # Of two layers: 2 where every expert has its share, 3 at most.
    assert seen[-1] < seen[0] - 0.3, seen


def test_padding_takes_no_expert():
    model = MODELS["mixtral_scanned"]()
    tokens = tokens_of(1, 6)
    ids = jnp.asarray([[0, 0, 0, 0, -1, -1]])
    routings = [report(model, tokens[:, :n], ids[:, :n]) for n in (6, 4)]
    for padded, bare in zip(*routings, strict=True):
        assert_close(padded[1].load, bare[1].load, dtype="float32")
        assert_close(
            padded[1].balance_loss, bare[1].balance_loss, dtype="float32", length=10
        )


@pytest.mark.parametrize(
    "routing", [pytest.param("softmax", marks=pytest.mark.slow), "product_key"]
)
def test_padding_takes_no_rookie_in_a_scanned_stack(routing):
    keys = jax.random.split(KEY, 4)
    blocks = []
    for k in keys[:2]:
        rookies = MixtureOfRookies(4, 4, 3, 2, routing=routing, key=k)
        blocks.append(TransformerBlock(Attention(4, 2, key=k), rookies, 4))
    options = {"scan": True, "remat": "full"}
    model = LanguageModel(VOCAB, 4, blocks, **options, key=keys[2])
    plain = LanguageModel(VOCAB, 4, blocks, key=keys[2])
    tokens, ids = tokens_of(1, 6), jnp.asarray([[0, 0, 0, 0, -1, -1]])

    @eqx.filter_jit
    def both(model, tokens, ids):
        def loss(model):
            out = model.forward(tokens, segment_ids=ids)
            seen = jnp.where(ids[..., None] >= 0, jnp.sin(out.logits), 0)
            return jnp.sum(seen) + sum(aux_losses(out.aux).values()), out.aux

        gradient, aux = eqx.filter_grad(loss, has_aux=True)(model)
        return gradient.embedding, aux

    gradient, padded = both(model, tokens, ids)
    want, bare = both(plain, tokens[:, :4], ids[:, :4])
    close = partial(assert_close, dtype="float32", length=40)
    for (_, got), (_, own) in zip(padded, bare, strict=True):
        close(got.load, own.load)
        close(got.balance_loss, own.balance_loss)
        np.testing.assert_array_equal(got.active_count, [[2, 2, 2, 2, 0, 0]])
    for got, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        close(got, leaf)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions_of_the_embedding_stream(positions):
    keys = jax.random.split(KEY, 3)
    length = 9 if positions == "learned" else None
    embedding = TokenEmbedding(VOCAB, 8, positions, length, key=keys[0])
    block = TransformerBlock(
        Attention(8, 2, key=keys[1]), SwiGLU(8, 12, key=keys[2]), 8
    )
    model = moved(LanguageModel(VOCAB, 8, [block], embedding=embedding, key=KEY), 2)
    tokens = tokens_of(2, 6)
    want = call(model, tokens)
    y, cache = prefill(model, tokens[:, :4], model.init_cache((2,), max_len=9))
    assert_close(y, want[:, :4], dtype="float32", length=100)
    for t in (4, 5):
        y, cache = step_by_one(model, tokens[:, t], cache)
        assert_close(y, want[:, t], dtype="float32", length=100)
    # Without positions an attention that sees everything would not tell an order.
    swapped = tokens.at[:, 0].set(tokens[:, 1]).at[:, 1].set(tokens[:, 0])
    assert np.any(np.abs(call(model, swapped)[:, -1] - want[:, -1]) > 1e-3)


def test_the_residual_stream_does_not_grow_with_depth():
    def size(n_layers):
        model = transformer_language_model(64, 32, n_layers, 4, scan=True, key=KEY)
        x = jax.random.normal(jax.random.key(1), (4, 16, 32))
        y, _ = eqx.filter_jit(lambda stack, x: stack(x))(model.stack, x)
        return float(jnp.mean((y - x) ** 2))

    # The variance that the blocks add is that of one block, whatever their number.
    assert 0.5 < size(8) / size(1) < 2


def test_the_mode_decides_the_attention():
    def make(**options):
        model = transformer_language_model(VOCAB, 8, 1, 2, **options, key=KEY)
        return blocks_of(model.stack)[0].mixer

    assert make().mode is AttentionMode.STANDARD
    assert make(mode="gqa", n_kv_heads=1).mode is AttentionMode.GQA
    assert make(n_kv_heads=1).mode is AttentionMode.GQA
    layer = make(mode=AttentionMode.DECOUPLED, sem_dim=2, geo_dim=4)
    assert isinstance(layer, DecoupledAttention)
    assert layer.v_dim == 6


@pytest.mark.errors
def test_modes_that_do_not_go_with_the_heads():
    make = lambda **options: transformer_language_model(
        VOCAB, 8, 1, 2, **options, key=KEY
    )
    with refused("`mode='standard'`", "n_kv_heads=1", "mode='gqa'"):
        make(mode="standard", n_kv_heads=1)
    with refused("`mode='gqa'` needs `n_kv_heads`"):
        make(mode="gqa")
    with refused("`mode` must be one of", "'grouped'"):
        make(mode="grouped")
    with refused("`d_model`", "positive integer"):
        transformer_language_model(VOCAB, 0, 1, 2, key=KEY)


@pytest.mark.errors
def test_a_cache_or_an_embedding_that_does_not_fit():
    embedding = TokenEmbedding(VOCAB, 8, "sinusoidal", key=KEY)
    block = ResidualBlock(Attention(8, 2, key=KEY), 8)
    with refused("`embedding` must have 5 ids of width 8", "got 11"):
        LanguageModel(5, 8, [block], embedding=embedding, key=KEY)
    model = LanguageModel(VOCAB, 8, [block], embedding=embedding, key=KEY)
    with refused("`cache` must be a ModelCache", "init_cache"):
        model.step(jnp.asarray(1), model.init_cache(max_len=3).stack)


@pytest.mark.errors
def test_a_feed_forward_of_another_width():
    block = TransformerBlock(Attention(8, 2, key=KEY), lambda x, key: x[..., :4], 8)
    with refused("TransformerBlock: the feed-forward must keep the shape"):
        block(jnp.ones((3, 8)))
