"""A language model with a diffusion head: its loss, its adapter, its text."""

import functools
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats
from support.model_oracle import model_row, moved
from support.numpy_oracles import wide
from support.quick import built, filled
from support.tolerances import assert_close

from capibara_eqx.layers import (
    Conv1DBlock,
    DiffusionNextTokenHead,
    TokenEmbedding,
)
from capibara_eqx.models import (
    LanguageModel,
    ResidualBlock,
    diffusion_generate,
    diffusion_language_loss,
    generate,
    mamba_language_model,
)


VOCAB, D, NEW = 7, 4, 5
TOKENS = np.asarray([[3, 1, 4, 1, 5, 2, 6], [5, 3, 5, 0, 2, 1, 1]], "int32")
# Two documents and padding left, right and between.
PACKED = np.asarray([[0, 0, 0, 2, 2, 2, -1], [-1, 5, 5, -1, 6, 6, 6]], "int32")
COUNTED = np.asarray([[1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1]], bool)
KEY = jax.random.key(0)


class Spy(DiffusionNextTokenHead):
    """Writes down what the loss reads; its samples are a fixed map of the features."""

    seen: ClassVar[list[Any]] = []

    def loss(self, features, targets, *, mask=None, key=None) -> Any:
        assert key is not None
        self.seen.append((features, targets, mask))
        return jnp.sum(features**2) + 3 * jnp.sum(targets)

    def sample(self, features, *, key=None) -> Any:
        return features @ jnp.asarray(turn(), features.dtype)


def turn() -> np.ndarray:
    return np.random.default_rng(8).standard_normal((D, D))


features = eqx.filter_jit(lambda model, tokens: model.features(tokens)[0])


@functools.cache
def make(tie: bool = False) -> LanguageModel:
    sizes: dict[str, Any] = {"d_state": 2, "d_conv": 2, "tie_embeddings": tie}

    def noisy(key):
        return moved(mamba_language_model(VOCAB, D, 1, **sizes, key=key), 3, size=0.7)

    return built(noisy, key=KEY)


@functools.cache
def positioned() -> LanguageModel:
    """One whose vectors depend on where they stand, through a cache of its own."""

    def noisy(key):
        block = ResidualBlock(Conv1DBlock(D, D, 2, key=key), D)
        embedding = TokenEmbedding(VOCAB, D, "learned", 8, True, key=key)
        model = LanguageModel(VOCAB, D, [block], embedding=embedding, key=key)
        return moved(model, 4, size=0.7)

    return built(noisy, key=KEY)


def table_of(model: LanguageModel) -> np.ndarray:
    table: Any = getattr(model.embedding, "table", model.embedding)
    return np.asarray(table.weight)


@functools.cache
def head(kind: Any = DiffusionNextTokenHead, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "enabled": True,
        "num_train_timesteps": 50,
        "time_embed_dim": 6,
    }
    return filled(kind, D, seed=1, size=0.4, **(arguments | options))


def batch(packed: bool) -> tuple[jax.Array, Any]:
    return jnp.asarray(TOKENS), jnp.asarray(PACKED) if packed else None


def cross_entropy(model, packed: bool) -> float:
    """Row by row, in NumPy: each token that counts, from those of its document."""
    total, count = 0.0, 0
    for row, ids, counted in zip(TOKENS, PACKED, COUNTED, strict=True):
        log_p = special.log_softmax(model_row(model, row, ids if packed else None), -1)
        for i in range(len(row) - 1):
            if counted[i] or not packed:
                total -= log_p[i, row[i + 1]]
                count += 1
    return total / count


@pytest.mark.parametrize("packed", [False, True])
def test_cross_entropy_of_documents(packed):
    tokens, ids = batch(packed)
    model = make()
    off = head(enabled=False)
    loss, parts = eqx.filter_jit(
        lambda m, h: diffusion_language_loss(m, h, tokens, segment_ids=ids)
    )(model, off)
    want = cross_entropy(model, packed)
    assert_close(loss, want, dtype="float32", length=100)
    assert set(parts) == {"cross_entropy"}
    np.testing.assert_array_equal(loss, parts["cross_entropy"])


@pytest.mark.parametrize("build", [make, positioned])
@pytest.mark.parametrize("packed", [False, True])
def test_what_the_head_is_trained_on(packed, build):
    tokens, ids = batch(packed)
    model, spy = build(), head(Spy, loss_weight=0.25)

    @eqx.filter_jit
    def run(model, spy, tokens, ids):
        loss = diffusion_language_loss(
            model, spy, tokens, segment_ids=ids, key=jax.random.key(2)
        )
        before = None if ids is None else ids[:, :-1]
        own = model.features(tokens[:, :-1], segment_ids=before)[0]
        return loss, Spy.seen.pop(), own

    (loss, parts), (features, targets, mask), own = run(model, spy, tokens, ids)
    np.testing.assert_array_equal(features, own)
    counted = COUNTED if packed else np.ones_like(COUNTED)
    np.testing.assert_array_equal(mask, counted)
    rows = table_of(model)[TOKENS[:, 1:]]
    np.testing.assert_array_equal(np.asarray(targets)[counted], rows[counted])
    assert_close(
        loss, parts["cross_entropy"] + 0.25 * parts["diffusion"], dtype="float32"
    )
    want = np.sum(wide(features) ** 2) + 3 * np.sum(wide(targets))
    assert_close(parts["diffusion"], want, dtype="float32", length=100)


@eqx.filter_jit
@functools.partial(eqx.filter_value_and_grad, has_aux=True)
def slope(both, tokens, ids):
    return diffusion_language_loss(both[0], both[1], tokens, segment_ids=ids, key=KEY)


def test_what_stands_at_padding_changes_nothing():
    model, real = make(), head()
    other = np.where(PACKED < 0, 10_000, TOKENS)
    ids = jnp.asarray(PACKED)
    (loss, _), grads = slope((model, real), jnp.asarray(TOKENS), ids)
    (same, _), same_grads = slope((model, real), jnp.asarray(other, "int32"), ids)
    assert np.isfinite(loss)
    np.testing.assert_array_equal(loss, same)
    jax.tree.map(np.testing.assert_array_equal, grads, same_grads)


def test_nothing_to_predict():
    ids = jnp.asarray([[-1] * 7, [*range(7)]], "int32")
    value, grads = slope((make(), head()), jnp.asarray(TOKENS), ids)
    assert float(value[0]) == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_only_the_head_of_a_frozen_model(frozen):
    tokens, ids = batch(True)

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def run(both):
        return diffusion_language_loss(
            both[0], both[1], tokens, segment_ids=ids, freeze_backbone=frozen, key=KEY
        )

    (loss, parts), (of_model, of_head) = run((make(True), head()))
    still = [bool(np.all(np.asarray(leaf) == 0)) for leaf in jax.tree.leaves(of_model)]
    assert all(still) if frozen else not any(still)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(of_head))
    assert_close(
        loss, 0.1 * parts["diffusion"] + parts["cross_entropy"], dtype="float32"
    )


def test_the_table_is_no_moving_target():
    """The features have a gradient, the targets none: the Spy's would be 3."""
    tokens, _ = batch(False)
    model, spy = make(), head(Spy)

    def of_targets(model):
        loss, parts = diffusion_language_loss(model, spy, tokens, key=KEY)
        x, _, _ = Spy.seen.pop()
        return parts["diffusion"] - jnp.sum(x**2)

    grads = eqx.filter_jit(eqx.filter_grad(of_targets))(model)
    assert_close(
        grads.embedding.weight,
        np.zeros((VOCAB, D)),
        dtype="float32",
        length=100,
        terms=1.0,
    )


def by_hand(model, prompt) -> list[int]:
    """Text of the Spy: the whole text is read again for every token."""
    tokens = list(prompt)
    table = wide(table_of(model))
    table = table / np.sqrt(np.mean(table**2, -1, keepdims=True))
    for _ in range(NEW):
        # Causal: what stands behind changes nothing, and one shape is compiled.
        padded = jnp.asarray(tokens + [0] * (8 - len(tokens)), "int32")
        x = wide(features(model, padded)[len(tokens) - 1])
        tokens.append(int(np.argmax(x @ turn() @ table.T)))
    return tokens[len(prompt) :]


@eqx.filter_jit
def generated(model, head, rows, **options):
    return diffusion_generate(model, head, rows, max_new_tokens=NEW, key=KEY, **options)


@pytest.mark.parametrize("build", [make, positioned])
def test_text_is_the_nearest_row_of_every_sample(build):
    prompts = [[3, 1, 4], [5], [2, 6]]
    want = [by_hand(build(), prompt) for prompt in prompts]
    assert len({token for text in want for token in text}) > 2, "it could not fail"
    rows = jnp.asarray([[3, 1, 4], [0, 0, 5], [2, 0, 6]], "int32")
    ids = jnp.asarray([[0, 0, 0], [-1, -1, 0], [0, -1, 0]], "int32")
    out = generated(build(), head(Spy), rows, segment_ids=ids)
    assert out.tokens.tolist() == want
    assert out.lengths.tolist() == [NEW] * 3


def test_text_of_one_prompt_that_stops():
    """Its end is a token of its own, and a prompt of bytes needs no rows."""
    want = by_hand(make(), [3, 1, 4])
    prompt = jnp.asarray([3, 1, 4], "uint8")
    whole = generated(make(), head(Spy), prompt)
    assert whole.tokens.tolist() == want
    rows = jnp.asarray([[0, 3, 1, 4]], "int32")
    ids = jnp.asarray([[-1, 0, 0, 0]], "int32")
    stopped = generated(make(), head(Spy), rows, segment_ids=ids, stop_token=want[1])
    assert stopped.lengths.tolist() == [want.index(want[1]) + 1]


def test_a_head_that_is_not_enabled_takes_no_part():
    prompt = jnp.asarray([[3, 1], [2, 2]], "int32")
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 2.0, "key": KEY}
    got = diffusion_generate(make(), head(enabled=False), prompt, **options)
    want = generate(make(), prompt, **options)
    assert got.tokens.tolist() == want.tokens.tolist()


def passing(width: int, *, key, **options: Any) -> LanguageModel:
    """A model whose block adds nothing to what it reads."""
    conv = Conv1DBlock(width, width, 1, use_bias=False, activation=None, key=key)
    conv = eqx.tree_at(lambda c: c.weight, conv, jnp.zeros_like(conv.weight))
    return LanguageModel(VOCAB, width, [ResidualBlock(conv, width)], **options, key=key)


def fixed(scores) -> LanguageModel:
    """A model with the same scores whatever it reads: its features start with 1."""
    model = built(passing, D, tie_embeddings=False, key=KEY)
    where: Any = lambda m: (m.embedding.weight, m.head.weight)
    rows = jnp.ones((VOCAB, D)).at[2, 1:].set(-1.0)
    weights = jnp.zeros((VOCAB, D)).at[:, 0].set(jnp.asarray(scores, "float32"))
    return eqx.tree_at(where, model, (rows, weights))


class Second(DiffusionNextTokenHead):
    """Draws token 2 always."""

    def sample(self, features, *, key=None) -> Any:
        return jnp.full_like(features, -1.0).at[..., 0].set(1.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1])
def test_the_share_of_the_head(share):
    scores = np.asarray([1.0, 0.0, -30.0, 2.0, -30.0, -30.0, -30.0])
    out = diffusion_generate(
        fixed(scores),
        head(Second),
        jnp.zeros((500, 1), "int32"),
        max_new_tokens=8,
        head_share=share,
        key=jax.random.key(4),
    )
    tokens = np.asarray(out.tokens)
    counts = np.bincount(tokens.ravel(), minlength=VOCAB)
    want = (1 - share) * special.softmax(scores)
    want[2] += share
    seen = want > 1e-6
    assert not np.any(counts[~seen])
    if seen.sum() > 1:
        test = stats.chisquare(
            counts[seen], tokens.size * want[seen] / want[seen].sum()
        )
        assert test.pvalue > 1e-3
        alike = np.mean(tokens[:, 1:] == tokens[:, :-1])
        assert abs(alike - np.sum(want**2)) < 0.05
        alike = np.mean(tokens[1:] == tokens[:-1])
        assert abs(alike - np.sum(want**2)) < 0.05


def test_an_adapter_learns_to_write():
    """A frozen model that passes tokens through, a head that learns what follows."""
    width, steps = 8, 400
    model = built(passing, width, key=KEY)
    # Rows far apart, of unlike length.
    rows = jnp.eye(VOCAB, width) * jnp.linspace(0.02, 0.4, VOCAB)[:, None]
    model = eqx.tree_at(lambda m: m.embedding.weight, model, rows)
    adapter = built(
        DiffusionNextTokenHead, width, True, time_embed_dim=16, key=jax.random.key(1)
    )
    # Powers of 3 modulo 7 go through all but 0.
    text = jnp.asarray([3**i % VOCAB for i in range(13)] * 2, "int32").reshape(2, 13)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @eqx.filter_jit
    def train(adapter, model):
        arrays, static = eqx.partition(adapter, eqx.is_inexact_array)

        def step(carry, key):
            arrays, state = carry

            def objective(arrays):
                tokens = jnp.concatenate([text] * 2)
                return diffusion_language_loss(
                    model,
                    eqx.combine(arrays, static),
                    tokens,
                    freeze_backbone=True,
                    key=key,
                )

            grads, parts = jax.grad(objective, has_aux=True)(arrays)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state)
            return (eqx.apply_updates(arrays, updates), state), parts

        start = (arrays, optimizer.init(arrays))
        keys = jax.random.split(jax.random.key(2), steps)
        (arrays, _), parts = jax.lax.scan(step, start, keys)
        return eqx.combine(arrays, static), parts

    adapter, parts = train(adapter, model)
    assert np.ptp(parts["cross_entropy"]) == 0, "the model stays as it is"
    assert parts["diffusion"][-50:].mean() < 0.5 * parts["diffusion"][:5].mean()
    first = jnp.asarray([[1], [3], [2], [6], [4], [5]] * 20, "int32")
    write = eqx.filter_jit(
        functools.partial(diffusion_generate, max_new_tokens=6, key=KEY)
    )
    out = write(model, adapter, first)
    written = np.concatenate([first, out.tokens], axis=-1)
    right = written[:, 1:] == written[:, :-1] * 3 % VOCAB
    assert right.mean() > 0.95
