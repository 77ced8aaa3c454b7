"""Generation: greedy against NumPy loops, drawing against the distribution."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.model_oracle import model_row, moved

from capibara_eqx.layers import Conv1DBlock
from capibara_eqx.models import (
    LanguageModel,
    ResidualBlock,
    generate,
    mamba_language_model,
)


VOCAB, NEW = 11, 5
PROMPTS = [[3, 1, 4, 1], [5], [9, 2, 6]]
# Scores without ties, in no order.
SCORES = np.asarray([0.3, -1.0, 1.7, 0.9, -0.2, 1.1])


@functools.cache
def make(scan=False):
    key = jax.random.key(0)
    model = mamba_language_model(VOCAB, 4, 2, d_state=2, scan=scan, key=key)
    # Large parameters: greedy text that does not repeat one token.
    return moved(model, 3, size=0.7)


def fixed_model(scores, kind: Any = Conv1DBlock):
    """A model whose scores do not depend on what it reads."""
    conv = kind(1, 1, 1, use_bias=False, activation=None, key=jax.random.key(0))
    conv = eqx.tree_at(lambda c: c.weight, conv, jnp.zeros((1, 1, 1)))
    model = LanguageModel(
        len(scores),
        1,
        [ResidualBlock(conv, 1)],
        tie_embeddings=False,
        key=jax.random.key(0),
    )
    ones = jnp.ones((len(scores), 1))
    where: Any = lambda m: (m.embedding.weight, m.head.weight)
    head = jnp.asarray(scores, "float32")[:, None]
    return eqx.tree_at(where, model, (ones, head))


def int32(values):
    return jnp.asarray(values, "int32")


@functools.cache
def greedy_text(prompt, count=NEW, scan=False):
    """The best tokens one after the other, each from all before it, in NumPy."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(model_row(make(scan), np.asarray(tokens))[-1])))
    return tokens[len(prompt) :]


def padded(where):
    """The prompts in one batch, and which of its tokens are padding."""
    rows, ids = [], []
    for prompt in PROMPTS:
        gap = 4 - len(prompt)
        row, pad = list(prompt), [7] * gap
        at = {"left": 0, "right": len(row), "inside": 1}[where]
        rows.append(row[:at] + pad + row[at:])
        ids.append([0] * at + [-1] * gap + [0] * (len(row) - at))
    return int32(rows), int32(ids)


@pytest.mark.parametrize("scan", [False, True], ids=["list", "scanned"])
def test_greedy_text_is_that_of_the_loops(scan):
    prompt = int32(PROMPTS[0])
    out = generate(make(scan), prompt, max_new_tokens=NEW, temperature=0.0)
    assert out.tokens.tolist() == greedy_text(tuple(PROMPTS[0]), scan=scan)
    assert int(out.lengths) == NEW
    assert len(set(out.tokens.tolist())) > 2, "a text that could not fail"


@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_prompts_of_unequal_length_share_a_batch(where):
    prompts, ids = padded(where)
    out = generate(
        make(), prompts, segment_ids=ids, max_new_tokens=NEW, temperature=0.0
    )
    want = [greedy_text(tuple(prompt)) for prompt in PROMPTS]
    assert out.tokens.tolist() == want
    assert out.lengths.tolist() == [NEW] * 3


def test_any_batch_axes_any_number_of_tokens():
    prompts = int32([[PROMPTS[0], PROMPTS[0][::-1]]])
    out = generate(make(), prompts, max_new_tokens=1, temperature=0.0)
    assert out.tokens.shape == (1, 2, 1)
    assert out.lengths.shape == (1, 2)
    want = [greedy_text(tuple(row), 1) for row in prompts[0].tolist()]
    assert out.tokens[0].tolist() == want


def test_a_whole_number_is_a_temperature():
    out = generate(make(), int32(PROMPTS[0]), max_new_tokens=NEW, temperature=0)
    assert out.tokens.tolist() == greedy_text(tuple(PROMPTS[0]))


def test_bytes_are_a_prompt():
    prompt = jnp.asarray(PROMPTS[0], "uint8")
    out = generate(make(), prompt, max_new_tokens=NEW, temperature=0.0)
    assert out.tokens.tolist() == greedy_text(tuple(PROMPTS[0]))


def test_a_stop_token_ends_a_row_and_leaves_the_others():
    prompts, ids = padded("left")
    texts = [greedy_text(tuple(prompt)) for prompt in PROMPTS]
    # Some rows write it before their last token, some do not write it.
    early = {token for text in texts for token in text[:-1]}
    stop = min(token for token in early if any(token not in text for text in texts))
    out = generate(
        make(),
        prompts,
        segment_ids=ids,
        max_new_tokens=NEW,
        temperature=0.0,
        stop_token=stop,
    )
    for row, text, length in zip(out.tokens, texts, out.lengths, strict=True):
        end = text.index(stop) + 1 if stop in text else NEW
        assert int(length) == end
        assert row.tolist() == text[:end] + [stop] * (NEW - end)
    assert min(out.lengths.tolist()) < NEW
    assert max(out.lengths.tolist()) == NEW


def test_the_loop_ends_with_the_last_row():
    steps = []

    class Loud(Conv1DBlock):
        def step(self, x, cache):
            jax.debug.callback(lambda: steps.append(1))
            return super().step(x, cache)

    model = fixed_model(SCORES, Loud)
    best = int(np.argmax(SCORES))

    def run(stop_token):
        steps.clear()
        out = generate(
            model,
            int32([[0], [1]]),
            max_new_tokens=20,
            temperature=0.0,
            stop_token=stop_token,
        )
        jax.effects_barrier()
        assert out.tokens.tolist() == [[best] * 20] * 2
        return out.lengths.tolist(), len(steps)

    lengths, count = run(stop_token=0)
    assert lengths == [20, 20]
    assert count >= 19
    lengths, count = run(stop_token=best)
    assert lengths == [1, 1]
    assert count <= 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_the_narrowest_choice_is_the_best_token(options):
    prompts, ids = padded("right")
    out = generate(
        make(),
        prompts,
        segment_ids=ids,
        max_new_tokens=NEW,
        temperature=3.0,
        key=jax.random.key(0),
        **options,
    )
    assert out.tokens.tolist() == [greedy_text(tuple(prompt)) for prompt in PROMPTS]


def restricted(temperature, top_k, top_p):
    """The distribution that should be drawn from, by sorting."""
    weights = np.exp(SCORES / temperature)
    order = np.argsort(-SCORES)
    if top_k is not None:
        weights[order[top_k:]] = 0
    weights /= weights.sum()
    if top_p is not None:
        # The smallest set of best tokens whose probability reaches top_p.
        reached = np.cumsum(weights[order])
        size = int(np.argmax(reached >= top_p)) + 1 if top_p < 1 else len(order)
        weights[order[size:]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (3.0, None, 1.0),
        (1.0, 3, None),
        (2.0, 3, 0.7),
        (1.0, None, 0.6),
        (1.0, 99, 0.95),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(temperature, top_k, top_p):
    out = generate(
        fixed_model(SCORES),
        jnp.zeros((500, 1), "int32"),
        max_new_tokens=8,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(1),
    )
    counts = np.bincount(np.asarray(out.tokens).ravel(), minlength=len(SCORES))
    want = restricted(temperature, top_k, top_p)
    assert not np.any(counts[want == 0])
    drawn = want > 0
    test = stats.chisquare(counts[drawn], counts.sum() * want[drawn])
    assert test.pvalue > 1e-3
    # Neither rows nor tokens of a row repeat each other.
    agreement = np.mean(np.asarray(out.tokens)[:, 1:] == np.asarray(out.tokens)[:, :-1])
    assert abs(agreement - np.sum(want**2)) < 0.05
    agreement = np.mean(np.asarray(out.tokens)[1:] == np.asarray(out.tokens)[:-1])
    assert abs(agreement - np.sum(want**2)) < 0.05


def test_the_key_decides():
    prompts, ids = padded("left")

    def draw(seed):
        key = jax.random.key(seed)
        return generate(
            make(), prompts, segment_ids=ids, max_new_tokens=NEW, key=key
        ).tokens.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_other_values_compile_nothing_new():
    traces = []

    class Counting(Conv1DBlock):
        def prefill(self, x, cache, *, segment_ids=None):
            traces.append(1)
            return super().prefill(x, cache, segment_ids=segment_ids)

    kind: Any = Counting
    block = ResidualBlock(kind(2, 2, 2, key=jax.random.key(0)), 2)
    model = LanguageModel(5, 2, [block], key=jax.random.key(1))

    def run(prompt, **options):
        generate(model, int32(prompt), max_new_tokens=3, top_p=0.9, **options)
        return len(traces)

    first = run([[0, 1], [2, 3]], key=jax.random.key(0))
    assert first > 0
    model = moved(model, 1)
    others = [
        {"temperature": 0.7, "key": jax.random.key(1)},
        {"temperature": 0.0},
        {"stop_token": 2, "key": jax.random.key(2)},
        {"segment_ids": int32([[-1, 0], [0, 0]]), "key": jax.random.key(3)},
    ]
    for options in others:
        assert run([[4, 4], [1, 0]], **options) == first, options


def test_it_runs_inside_a_compiled_function():
    @eqx.filter_jit
    def texts(model, prompt, key):
        best = generate(model, prompt, max_new_tokens=NEW, temperature=0.0)
        drawn = generate(model, prompt, max_new_tokens=NEW, temperature=2.0, key=key)
        return best.tokens, drawn.tokens

    prompt, key = int32(PROMPTS[0]), jax.random.key(4)
    best, drawn = texts(make(), prompt, key)
    assert best.tolist() == greedy_text(tuple(PROMPTS[0]))
    want = generate(make(), prompt, max_new_tokens=NEW, temperature=2.0, key=key)
    assert drawn.tolist() == want.tokens.tolist()


def test_ids_that_the_model_does_not_have_are_a_runtime_error():
    model = mamba_language_model(7, 3, 1, d_state=2, key=jax.random.key(0))
    run = lambda prompt, ids=None: generate(
        model, jnp.asarray([prompt]), max_new_tokens=1, segment_ids=ids, temperature=0
    )
    for prompt in ([1, 7, 2], [1, -1, 2]):
        with pytest.raises(RuntimeError, match="ids outside 0 to 6"):
            run(prompt)
    # At padding any number may stand.
    run([9, 1, 2], jnp.asarray([[-1, 0, 0]]))
