import bz2
import lzma
import math
import zlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara_eqx.train import _references, reference_bits_per_byte
from capibara_eqx.train._references import ngram_probabilities


# A few roundings of float64 for each of four interpolations.
RTOL = 16 * np.finfo(np.float64).eps
NGRAMS = [f"order{k}_ngram" for k in range(4)]

# Few different bytes, the extremes among them, make histories that occur often.
ALPHABET = st.sampled_from([0, 1, 97, 255])


def text(min_size, max_size):
    return st.lists(ALPHABET, min_size=min_size, max_size=max_size).map(bytes)


def array(content):
    return np.frombuffer(content, np.uint8)


def witten_bell(train, order, history, byte):
    """The formula by recursion over rational numbers, one probability at a time."""
    if order < 0:
        return Fraction(1, 256)
    lower = witten_bell(train, order - 1, history[1:], byte)
    if len(history) < order:
        return lower
    assert len(history) == order
    followers = Counter(
        train[i + order]
        for i in range(len(train) - order)
        if train[i : i + order] == history
    )
    total, kinds = sum(followers.values()), len(followers)
    if total == 0:
        return lower
    return (followers[byte] + kinds * lower) / Fraction(total + kinds)


def oracle(train, content):
    table = np.empty((4, len(content)))
    for order in range(4):
        for i, byte in enumerate(content):
            seen = min(order, i)
            table[order, i] = witten_bell(train, seen, content[i - seen : i], byte)
    return table


@settings(max_examples=60, deadline=None)
@given(train=text(1, 24), content=text(1, 10))
def test_ngrams_follow_the_formula(train, content):
    got = ngram_probabilities(array(train), array(content))
    np.testing.assert_allclose(got, oracle(train, content), rtol=RTOL)


@settings(max_examples=60, deadline=None)
@given(train=text(1, 60), history=text(3, 3))
def test_probabilities_sum_to_one(train, history):
    # Every fourth byte is another one of the 256, each after the same three.
    content = b"".join(history + bytes([byte]) for byte in range(256))
    total = ngram_probabilities(array(train), array(content))[:, 3::4].sum(axis=1)
    np.testing.assert_allclose(total, 1, rtol=256 * np.finfo(np.float64).eps)


@settings(max_examples=40, deadline=None)
@given(train=text(1, 40), content=text(1, 12), chunk=st.integers(1, 9))
def test_counting_in_chunks_changes_nothing(train, content, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_references, "_CHUNK", chunk)
        got = ngram_probabilities(array(train), array(content))
    np.testing.assert_allclose(got, oracle(train, content), rtol=RTOL)


def test_an_example_by_hand():
    # After "a" in "abab" comes "b", twice: N(a) = N(ab) = 2, T(a) = 1. In all there
    # are two of each letter: N() = 4, T() = 2.
    got = ngram_probabilities(array(b"abab"), array(b"ab"))
    order0 = (2 + 2 / 256) / 6
    order1 = (2 + 1 * order0) / 3
    expected = [[order0, order0]] + 3 * [[order0, order1]]
    np.testing.assert_allclose(got, expected, rtol=RTOL)
    bits = reference_bits_per_byte(array(b"abab"), array(b"ab"))
    assert bits["order0_ngram"] == pytest.approx(-math.log2(order0), rel=RTOL)
    expected = -(math.log2(order0) + math.log2(order1)) / 2
    for name in NGRAMS[1:]:
        assert bits[name] == pytest.approx(expected, rel=RTOL)


def test_longer_text_follows_the_formula():
    rng = np.random.default_rng(0)
    train = bytes(rng.choice([7, 8, 9], 3000).astype(np.uint8))
    content = bytes(rng.choice([7, 8, 9, 10], 17).astype(np.uint8))
    got = ngram_probabilities(array(train), array(content))
    np.testing.assert_allclose(got, oracle(train, content), rtol=RTOL)


def test_compressors_are_at_their_highest_level():
    content = b"".join(b"line %d of a text\n" % (i * i) for i in range(400))
    got = reference_bits_per_byte(array(b"unrelated"), array(content))
    smallest = {
        "zlib": min(len(zlib.compress(content, level)) for level in range(10)),
        "bz2": len(bz2.compress(content, 9)),
        "lzma": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)),
    }
    for name, size in smallest.items():
        assert got[name] == 8 * size / len(content)


def test_names_and_types():
    got = reference_bits_per_byte(array(b"some text"), array(b"text"))
    assert list(got) == [*NGRAMS, "zlib", "bz2", "lzma"]
    assert {type(value) for value in got.values()} == {float}


def test_uniform_random_bytes_need_eight_bits():
    rng = np.random.default_rng(1)
    train = rng.integers(0, 256, 400_000, dtype=np.uint8)
    heldout = rng.integers(0, 256, 100_000, dtype=np.uint8)
    got = reference_bits_per_byte(train, heldout)
    # Nothing can be learned, so chance alone could bring a model below 8 bits.
    for bits in got.values():
        assert 7.99 < bits < 10
    # Order 0 pays for its 256 estimated frequencies: about 256 / (2 ln 2 * 400000).
    assert got["order0_ngram"] == pytest.approx(8.0005, abs=5e-4)


def test_constant_bytes_need_almost_nothing():
    train = np.full(100_000, 65, np.uint8)
    got = reference_bits_per_byte(train, train[:50_000])
    assert max(got.values()) < 0.03
    # One kind in 100000: p_0 = (100000 + 1/256) / 100001.
    expected = -math.log2((100_000 + 1 / 256) / 100_001)
    # Next to 1 the logarithm keeps only the absolute precision of float64.
    assert got["order0_ngram"] == pytest.approx(expected, abs=4e-16)


def test_a_markov_chain_is_known_from_order_one_on():
    rng = np.random.default_rng(2)
    # The next byte is the last one plus 1 or 2, so exactly one bit is unknown.
    steps = rng.integers(1, 3, 200_000)
    content = (np.cumsum(steps) % 16).astype(np.uint8)
    got = reference_bits_per_byte(content[:150_000], content[150_000:])
    assert got["order0_ngram"] == pytest.approx(4.0, abs=0.01)
    for name in NGRAMS[1:]:
        assert got[name] == pytest.approx(1.0, abs=0.01)
        assert got[name] > 0.999


@pytest.mark.errors
@pytest.mark.parametrize("name", ["train", "heldout"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(0, np.uint8), "is empty; at least one byte"),
        (np.zeros(4, np.int32), r"one axis of uint8, got shape \(4,\) of int32"),
        (np.zeros((2, 2), np.uint8), r"one axis of uint8, got shape \(2, 2\)"),
    ],
)
def test_wrong_arrays_are_named(name, bad, message):
    arguments = {"train": array(b"text"), "heldout": array(b"text"), name: bad}
    with pytest.raises(ValueError, match=f"`{name}` .*{message}"):
        reference_bits_per_byte(**arguments)
