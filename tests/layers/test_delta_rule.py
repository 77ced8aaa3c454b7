"""The delta rule in chunks against a loop, and what is known of it exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import fast_weight_oracle as oracle
from support.derivatives import (
    check_first_order,
    check_second_order,
    check_third_order,
)
from support.precision import enable_x64
from support.rows import seeds
from support.tolerances import assert_close

from capibara_eqx.kernels import ssd
from capibara_eqx.layers import delta_rule
from capibara_eqx.layers._linear_attention import linear_attention


SEQ = 7


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def point_of(rng, batch=(), seq=SEQ, heads=2, width=3, v_width=2, decay=True):
    """Queries, keys of length one, values, rates up to 2, decays and a state."""
    lead = (*batch, seq, heads)
    point = {
        "q": rng.standard_normal((*lead, width)),
        "k": unit(rng.standard_normal((*lead, width))),
        "v": rng.standard_normal((*lead, v_width)),
        "beta": 2 * rng.random(lead),
        "initial_state": rng.standard_normal((*batch, heads, v_width, width)),
    }
    if decay:
        point["log_decay"] = -rng.exponential(size=lead)
    return point


@functools.cache
def compiled(chunk_size):
    return jax.jit(functools.partial(delta_rule, chunk_size=chunk_size))


def as_called(point):
    first = tuple(point[name] for name in ("q", "k", "v", "beta"))
    rest = {n: x for n, x in point.items() if n not in ("q", "k", "v", "beta")}
    return first, rest


# Chunks of a token, chunks that do not divide the row, and one that holds it.
@given(
    chunk_size=st.sampled_from([1, 3, 64]),
    starts=st.lists(st.booleans(), min_size=SEQ, max_size=SEQ),
    seed=seeds,
)
@example(chunk_size=3, starts=[True] * SEQ, seed=0)
@example(chunk_size=64, starts=[False] * SEQ, seed=1)
def test_chunks_are_the_loop(chunk_size, starts, seed):
    """With documents that begin anywhere."""
    point = point_of(np.random.default_rng(seed))
    with enable_x64(True):
        point["reset"] = np.asarray(starts)
        args, rest = as_called(point)
        o, state = compiled(chunk_size)(*args, **rest)
    want, want_state = oracle.delta_rule(*args, **rest)
    assert_close(o, want, dtype="float64", length=50)
    assert_close(state, want_state, dtype="float64", length=50)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("seq", [1, 70])
def test_rows_of_any_number_and_length(batch, seq, decay):
    """In float32, more tokens than a chunk; one token; no state to begin with."""
    point = point_of(np.random.default_rng(len(batch)), batch, seq, decay=decay)
    del point["initial_state"]
    point = {name: x.astype("float32") for name, x in point.items()}
    args, rest = as_called(point)
    o, state = compiled(None)(*args, **rest)
    want, want_state = oracle.delta_rule(*args, **rest)
    assert_close(o, want, dtype="float32", length=100)
    assert_close(state, want_state, dtype="float32", length=100)


@pytest.mark.slow
def test_a_row_is_its_parts():
    point = point_of(np.random.default_rng(2), (2,))
    with enable_x64(True):
        (q, k, v, beta), rest = as_called(point)
        log_decay, state = rest["log_decay"], rest["initial_state"]
        want, want_state = compiled(3)(q, k, v, beta, **rest)
        parts = []
        for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
            o, state = compiled(3)(
                *(x[:, part] for x in (q, k, v, beta)),
                log_decay=log_decay[:, part],
                initial_state=state,
            )
            parts.append(o)
    assert_close(np.concatenate(parts, 1), want, dtype="float64", length=50)
    assert_close(state, want_state, dtype="float64", length=50)


@pytest.mark.slow
def test_bfloat16_is_read_into_a_float32_memory():
    point = point_of(np.random.default_rng(3))
    del point["initial_state"]
    narrow = {name: jnp.asarray(x, "bfloat16") for name, x in point.items()}
    args, rest = as_called(narrow)
    o, state = compiled(3)(*args, **rest)
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    seen = {name: np.asarray(x, "float32") for name, x in narrow.items()}
    args, rest = as_called(seen)
    want, want_state = oracle.delta_rule(*args, **rest)
    assert_close(np.asarray(o, "float32"), want, dtype="bfloat16", factor=1.0)
    assert_close(state, want_state, dtype="float32", length=50)


@pytest.mark.slow
def test_equal_keys_at_the_greatest_rate_stay_exact():
    """The inverse of the system has entries of 2, its powers grow without bound."""
    k = np.tile(unit(np.ones((1, 1, 4), "float32")), (64, 1, 1))
    v = np.random.default_rng(4).standard_normal((64, 1, 2)).astype("float32")
    beta = np.full((64, 1), 2.0, "float32")
    o, state = compiled(None)(k, k, v, beta)
    want, want_state = oracle.delta_rule(k, k, v, beta)
    assert_close(o, want, dtype="float32", length=64)
    assert_close(state, want_state, dtype="float32", length=64)


def losses(reset, chunk_size=3):
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((SEQ, 2, 2)), rng.standard_normal((2, 2, 3))
    starts = None if reset is None else np.asarray(reset)

    def loss(point):
        args, rest = as_called(point)
        o, state = delta_rule(*args, **rest, reset=reset, chunk_size=chunk_size)
        return jnp.sum(weights[0] * o**2) + jnp.sum(weights[1] * state**2)

    def by_loop(point):
        args, rest = as_called(point)
        o, state = oracle.delta_rule(*args, **rest, reset=starts)
        return np.sum(weights[0] * o**2) + np.sum(weights[1] * state**2)

    return loss, by_loop


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_every_order(packed):
    point = point_of(np.random.default_rng(6))
    # Through chunks, through documents, and through the state that is kept.
    reset = jnp.arange(SEQ) == 4 if packed else None
    check_first_order(*losses(reset), point)
    check_second_order(*losses(reset), point)
    check_third_order(*losses(reset), point)


# What is known exactly.


def test_a_unit_key_with_rate_one_recalls_its_value():
    """Whatever the memory held: S k = v after the token."""
    point = point_of(np.random.default_rng(7), seq=1, decay=False)
    with enable_x64(True):
        k, v, ones = point["k"], point["v"], np.ones((1, 2))
        _, state = compiled(3)(k, k, v, ones, initial_state=point["initial_state"])
        recalled = jnp.einsum("hvd,shd->shv", state, k)
    assert_close(recalled, v, dtype="float64", length=10)


@pytest.mark.parametrize("head_dim", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_as_many_orthonormal_keys_as_there_are_channels_are_all_recalled(head_dim):
    rng = np.random.default_rng(head_dim)
    keys, _ = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
    k, v = keys[:, None], rng.standard_normal((head_dim, 1, 3))
    with enable_x64(True):
        _, state = compiled(3)(k, k, v, np.ones((head_dim, 1)))
        zeros = np.zeros((head_dim, 1))
        recalled, after = compiled(3)(k, k, v * 0, zeros, initial_state=state)
    assert_close(recalled, v, dtype="float64", length=10)
    np.testing.assert_array_equal(after, state)


def test_attention_recalls_as_many_orthonormal_keys_as_it_has_channels():
    """As a sum; of one key more it recalls none of two exactly."""
    rng = np.random.default_rng(9)
    keys, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    v, none = rng.standard_normal((5, 1, 3)), np.zeros((5, 1, 5))
    start = np.zeros((1, 3, 5))
    with enable_x64(True):
        run = compiled_attention(3)
        k = keys[:, None]
        _, state = run(k, k, v, none, initial_state=start)
        recalled, _ = run(k, k, v * 0, none, initial_state=state)
        # The fifth key lies between two of the others.
        k = k.copy()
        k[4] = unit(k[0] + k[1])
        _, state = run(k, k, v, none, initial_state=start)
        mixed, _ = run(k, k, v * 0, none, initial_state=state)
    assert_close(recalled, v, dtype="float64", length=10)
    mixed = np.asarray(mixed)
    wrong = np.max(np.abs(mixed - v), axis=(1, 2))
    assert (wrong[[0, 1, 4]] > 0.1).all()
    assert_close(mixed[2:4], v[2:4], dtype="float64", length=10)


def test_pairs_are_recalled_among_a_hundred_words():
    """Multi-query associative recall: the word of the value that is nearest."""
    rng = np.random.default_rng(10)
    keys, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    words = unit(rng.standard_normal((100, 16)))
    asked = rng.permutation(5)
    pairs = rng.permutation(100)[:5]
    k, v = keys[:, None], words[pairs][:, None]
    q, nothing = k[asked], np.zeros((5, 1, 16))
    zeros, start = np.zeros((5, 1)), np.zeros((1, 16, 5))
    with enable_x64(True):
        _, state = compiled(3)(k, k, v, zeros + 1)
        by_delta, _ = compiled(3)(q, q, nothing, zeros, initial_state=state)
        none = np.zeros((5, 1, 5))
        _, state = compiled_attention(3)(k, k, v, none, initial_state=start)
        by_sum, _ = compiled_attention(3)(q, q, nothing, none, initial_state=state)
    for found in (by_delta, by_sum):
        answers = np.argmax(np.asarray(found)[:, 0] @ words.T, axis=1)
        np.testing.assert_array_equal(answers, pairs[asked])


@pytest.mark.slow
def test_of_random_keys_the_delta_rule_recalls_more_than_a_sum():
    """As many pairs as there are channels, 100 times; the last one exactly."""
    rng = np.random.default_rng(8)
    k = unit(rng.standard_normal((100, 8, 1, 8)))
    v, ones = rng.standard_normal((100, 8, 1, 4)), np.ones((100, 8, 1))
    with enable_x64(True):
        _, state = compiled(3)(k, k, v, ones)
    summed = np.einsum("rshv,rshd->rhvd", v, k)
    learned, added = (
        np.mean((np.einsum("rhvd,rshd->rshv", S, k) - v) ** 2, axis=(0, 2, 3))
        for S in (state, summed)
    )
    assert learned[-1] < 1e-28
    assert np.sum(learned) < 0.8 * np.sum(added)


@pytest.mark.slow
def test_a_token_is_one_step_of_gradient_descent():
    """On half the squared error of what is recalled, with the rate beta."""
    point = point_of(np.random.default_rng(9), seq=1, heads=1, decay=False)
    k, v, beta = (point[name][0, 0] for name in ("k", "v", "beta"))
    start = point["initial_state"]

    def error(S):
        return 0.5 * jnp.sum((S @ k - v) ** 2)

    with enable_x64(True):
        args, rest = as_called(point)
        _, state = compiled(3)(*args, **rest)
        want = start[0] - beta * jax.grad(error)(jnp.asarray(start[0]))
    assert_close(state[0], want, dtype="float64", length=10)


@pytest.mark.slow
def test_one_step_on_all_tokens_is_linear_attention():
    """From zero, with half the rate on the squared error (arXiv 2212.07677)."""
    rng = np.random.default_rng(10)
    q, k, v = (rng.standard_normal((SEQ, 1, n)) for n in (3, 3, 2))

    def error(S):
        return jnp.sum((jnp.einsum("vd,shd->shv", S, k) - v) ** 2)

    with enable_x64(True):
        learned = -0.5 * jax.grad(error)(jnp.zeros((2, 3)))
        zeros = np.zeros((SEQ, 1))
        o, state = jax.jit(ssd)(v, zeros, k, q)
        assert_close(state[0], learned, dtype="float64", length=10)
        assert_close(o[-1, 0], learned @ q[-1, 0], dtype="float64", length=10)
        ours = compiled_attention(3)(
            *(q, k, v, np.zeros((SEQ, 1, 3))), initial_state=np.zeros((1, 2, 3))
        )
        assert_close(ours[0], o, dtype="float64", length=10)
        assert_close(ours[1], state, dtype="float64", length=10)


@pytest.mark.slow
def test_at_a_small_rate_the_rule_is_linear_attention():
    """What a token recalls wrongly is then its value: an error of second order."""
    point = point_of(np.random.default_rng(11), decay=False)
    del point["initial_state"]
    (q, k, v, beta), _ = as_called(point)
    with enable_x64(True):
        summed, _ = jax.jit(ssd)(v, np.zeros_like(beta), k, q, coefficient=beta)
        errors = []
        for rate in (1e-3, 1e-4):
            o, _ = compiled(3)(q, k, v, rate * beta)
            errors.append(np.max(np.abs(o / rate - summed)))
    assert 9 < errors[0] / errors[1] < 11


@pytest.mark.slow
def test_a_rate_of_two_reflects():
    """Grazzi et al.: the eigenvalue along a unit key is 1 - beta."""
    k = unit(np.asarray([[[1.0, -2.0, 2.0]]]))
    start = np.random.default_rng(12).standard_normal((1, 2, 3))
    with enable_x64(True):
        for beta, eigenvalue in ((0.0, 1.0), (1.0, 0.0), (1.5, -0.5), (2.0, -1.0)):
            _, state = compiled(3)(
                *(k, k, np.zeros((1, 1, 2)), np.full((1, 1), beta)),
                initial_state=start,
            )
            along, want = state @ k[0, 0], eigenvalue * (start @ k[0, 0])
            np.testing.assert_allclose(along, want, atol=1e-14)


@pytest.mark.slow
def test_a_decay_of_minus_infinity_is_a_new_start():
    point = point_of(np.random.default_rng(13))
    starts = np.arange(SEQ) == 3
    with enable_x64(True):
        args, rest = as_called(point)
        want = compiled(3)(*args, **rest, reset=starts)
        log_decay = np.where(starts[:, None], -np.inf, rest.pop("log_decay"))
        got = compiled(3)(*args, **rest, log_decay=log_decay)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@given(
    chunk_size=st.sampled_from([1, 3, 16]),
    starts=st.lists(st.booleans(), min_size=SEQ, max_size=SEQ),
    strength=st.sampled_from([0.1, 1.0, 200.0]),
    seed=seeds,
)
def test_attention_with_decays_is_its_loop(chunk_size, starts, strength, seed):
    """Even where products of decays underflow, whose quotient would overflow."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((SEQ, 2, n)) for n in (3, 3, 2))
    log_decay = -strength * rng.exponential(size=k.shape)
    rest = {"initial_state": rng.standard_normal((2, 2, 3)), "reset": np.array(starts)}
    with enable_x64(True):
        o, state = compiled_attention(chunk_size)(q, k, v, log_decay, **rest)
    want, want_state = oracle.linear_attention(q, k, v, log_decay, **rest)
    assert_close(o, want, dtype="float64", length=50)
    assert_close(state, want_state, dtype="float64", length=50)


@functools.cache
def compiled_attention(chunk_size):
    return jax.jit(functools.partial(linear_attention, chunk_size=chunk_size))
