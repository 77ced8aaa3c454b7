import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _attention_oracle, _harness, _inputs, _llama_oracle
from benchmarks.llama_decode import _QUICK_SIZES, llama_weights
from capibara_eqx.kernels import attention
from capibara_eqx.models import transformer_language_model


# More than the queries that the reference reads at once, and no multiple of them.
SHAPE = (2, 261, 2, 3)


def test_the_oracle_agrees_with_attention_and_its_gradients():
    q, k, v, dy = _inputs.normal(0, *[SHAPE] * 4)

    def function(q, k, v):
        return attention(q, k, v, is_causal=True, implementation="reference")

    expected = _attention_oracle.gradients(q, k, v, dy)
    arrays = (jnp.asarray(x) for x in (q, k, v))
    both = jax.jit(_harness.with_gradients(function, jnp.asarray(dy)))
    got = both(*arrays)
    # Sums over at most 261 tokens of numbers rounded to 6e-8.
    assert _harness.max_error(got, expected) < 4e-6
    y, gradients = expected
    wrong = (y, tuple(g * 1.001 for g in gradients))
    assert _harness.max_error(got, wrong) > 5e-4


def test_the_gradients_of_the_oracle_are_the_slopes_of_its_result():
    rng = np.random.default_rng(0)
    q, k, v, dy = rng.normal(size=(4, 1, 7, 2, 3))
    direction = rng.normal(size=(3, 1, 7, 2, 3))
    small = 1e-6

    def moved(sign):
        inputs = zip((q, k, v), direction, strict=True)
        ends = (x + sign * small * along for x, along in inputs)
        return np.sum(dy * _attention_oracle.gradients(*ends, dy=dy)[0])

    slope = (moved(1) - moved(-1)) / (2 * small)
    _, gradients = _attention_oracle.gradients(q, k, v, dy)
    along = sum(np.sum(g * d) for g, d in zip(gradients, direction, strict=True))
    assert along == pytest.approx(slope, rel=1e-6)


def test_a_token_sees_itself_and_what_came_before():
    q, k, v = np.zeros((3, 1, 3, 1, 1))
    v[0, :, 0, 0] = [1.0, 2.0, 6.0]
    # No score is larger than another: means of the values so far.
    y, (_, _, dv) = _attention_oracle.gradients(q, k, v, np.ones_like(v))
    np.testing.assert_allclose(y[0, :, 0, 0], [1.0, 1.5, 3.0])
    np.testing.assert_allclose(dv[0, :, 0, 0], [1 + 1 / 2 + 1 / 3, 5 / 6, 1 / 3])


def test_the_oracle_of_a_llama_reads_a_chunk_as_it_reads_tokens(getkey):
    model = transformer_language_model(**_QUICK_SIZES, key=getkey())
    weights = {
        name: np.asarray(value, np.float64)
        for name, value in llama_weights(model).items()
    }
    n_heads = _QUICK_SIZES["n_heads"]
    tokens = np.random.default_rng(0).integers(50, size=(2, 5))
    scores = _llama_oracle._scores(weights, n_heads, tokens, [])
    assert _harness.max_error(eqx.filter_jit(model)(jnp.asarray(tokens)), scores) < 4e-6
    cache = []
    for t in range(5):
        own = _llama_oracle._scores(weights, n_heads, tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(own[:, 0], scores[:, t], rtol=1e-10, atol=1e-12)
    first = _llama_oracle.greedy(weights, n_heads, tokens, 1)
    np.testing.assert_array_equal(first[:, 0], np.argmax(scores[:, -1], axis=-1))
