"""Token and byte embeddings against NumPy in float64."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from support.derivatives import (
    check_first_order,
    check_second_order,
    check_vmap_of_derivatives,
)
from support.finite_differences import Point
from support.layer_cases import packed_rows, seeds
from support.numpy_oracles import documents, wide
from support.numpy_oracles import sinusoidal_positions as waves
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.layers import (
    ByteEmbedding,
    LearnedPositions,
    TokenEmbedding,
    weight_decay_mask,
)


LONGEST = 12
# The error of an angle is that of four factors, one for each byte of a position.
TERMS = 4
NUMBERS: dict[str, Any] = {"seed": 0, "size": 1.0}


@functools.cache
def compiled():
    return eqx.filter_jit(lambda layer, x, **options: layer(x, **options))


@functools.cache
def token_embedding(positions="learned", **options) -> Any:
    max_len = LONGEST if positions == "learned" else None
    return filled(TokenEmbedding, 11, 5, positions, max_len, **options, **NUMBERS)


def embedded(layer, tokens, positions):
    """What the layer computes, token by token."""
    x = wide(layer.table.weight)[tokens]
    if layer.scale:
        x = x * math.sqrt(layer.d_model)
    if layer.positions == "sinusoidal":
        x = x + waves(positions, layer.d_model)
    if layer.positions == "learned":
        x = x + wide(layer.learned.weight)[positions]
    return x


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
@given(seed=seeds, batch=st.sampled_from([(), (3,), (2, 2)]))
def test_tokens_and_positions(positions, scale, seed, batch):
    layer = token_embedding(positions, scale=scale)
    tokens = np.random.default_rng(seed).integers(0, 11, (*batch, 7))
    want = embedded(layer, tokens, np.broadcast_to(np.arange(7), tokens.shape))
    got = compiled()(layer, tokens.astype("int32"))
    assert_close(got, want, dtype="float32", length=TERMS)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@given(row=packed_rows, seed=seeds)
@example(row=[5, 5, -1, 5, 3, 5], seed=0)
def test_positions_count_within_documents(positions, row, seed):
    layer = token_embedding(positions)
    ids = np.asarray(row, "int32")
    tokens = np.random.default_rng(seed).integers(0, 11, ids.shape)
    where = np.zeros(ids.shape, int)
    for document in documents(ids):
        where[document] = np.arange(len(document))
    want = embedded(layer, tokens, where)
    want[ids < 0] = 0.0
    # What stands at padding need not be an id.
    tokens = np.where(ids < 0, -3, tokens).astype("int32")
    call = packed()
    assert_close(call(layer, tokens, ids), want, dtype="float32", length=TERMS)


@functools.cache
def packed():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions_can_be_given(positions):
    layer = token_embedding(positions, scale=True)
    tokens = np.asarray([[1, 10, 3], [0, 0, 4]])
    where = np.asarray([[11, 0, 2], [5, 5, 1]])
    ids = jnp.asarray([[0, 0, 0], [2, -1, 2]], "int32")
    want = embedded(layer, tokens, where)
    tokens, where = jnp.asarray(tokens, "int8"), jnp.asarray(where, "uint8")
    close = functools.partial(assert_close, dtype="float32", length=TERMS)
    close(compiled()(layer, tokens, positions=where), want)
    want[1, 1] = 0.0
    outside = np.array(where)
    outside[1, 1] = 200
    outside = jnp.asarray(outside)
    close(compiled()(layer, tokens, positions=outside, segment_ids=ids), want)


@given(cuts=st.lists(st.integers(1, 3), min_size=4, max_size=4), seed=seeds)
def test_a_document_in_pieces_takes_the_positions_of_the_whole(cuts, seed):
    layer = token_embedding()
    tokens = np.random.default_rng(seed).integers(0, 11, (2, sum(cuts)))
    where = np.broadcast_to(np.arange(sum(cuts)), tokens.shape)
    want = embedded(layer, tokens, where)
    cache, parts = layer.init_cache((2,)), []
    for end, size in zip(np.cumsum(cuts), cuts, strict=True):
        piece = tokens[:, end - size : end].astype("int32")
        x, cache = streamed()(layer, piece, cache)
        parts.append(x)
    assert_close(np.concatenate(parts, 1), want, dtype="float32", length=TERMS)
    np.testing.assert_array_equal(cache.length, [sum(cuts)] * 2)


@functools.cache
def streamed():
    return eqx.filter_jit(
        lambda layer, x, cache, ids=None: layer.prefill(x, cache, segment_ids=ids)
    )


def test_a_cache_after_padding_and_another_document():
    layer = token_embedding()
    tokens = jnp.asarray([[1, 2, 3, 4]] * 3)
    ids = jnp.asarray([[-1, 5, 5, -1], [-1, -1, -1, -1], [5, 6, 6, 6]], "int32")
    _, cache = streamed()(layer, tokens, layer.init_cache((3,)), ids)
    np.testing.assert_array_equal(cache.length, [2, 0, 3])
    np.testing.assert_array_equal(cache.segment, [5, -1, 6])
    more = jnp.asarray([[5], [8], [5]], "int32")
    x, after = streamed()(layer, tokens[:, :1], cache, more)
    want = embedded(layer, np.asarray([[1]] * 3), np.asarray([[2], [0], [0]]))
    assert_close(x, want, dtype="float32", length=TERMS)
    np.testing.assert_array_equal(after.length, [3, 1, 1])


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_derivatives_of_a_token_embedding(positions):
    rng = np.random.default_rng(0)
    tokens = np.asarray([[1, 4, 4, 0, 2], [3, 1, 0, 0, 4]])
    ids = np.asarray([[0, 0, 1, 1, -1], [2, 2, 2, -1, 2]], "int32")
    where = np.asarray([[0, 1, 0, 1, 0], [0, 1, 2, 0, 3]])
    max_len = 4 if positions == "learned" else None
    layer = filled(TokenEmbedding, 5, 3, positions, max_len, True, **NUMBERS)
    shapes = {"table": (5, 3), "learned": (4, 3)}
    if positions == "sinusoidal":
        del shapes["learned"]
    readout = rng.standard_normal((2, 5, 3))

    def with_weights(arrays):
        changed = eqx.tree_at(lambda m: m.table.weight, layer, arrays["table"])
        if positions == "sinusoidal":
            return changed
        return eqx.tree_at(lambda m: m.learned.weight, changed, arrays["learned"])

    def function(arrays):
        y = with_weights(arrays)(jnp.asarray(tokens), segment_ids=jnp.asarray(ids))
        return jnp.sum(jnp.asarray(readout) * jnp.sin(y))

    def oracle(point):
        x = point["table"][tokens] * math.sqrt(3)
        place = waves(where, 3) if positions == "sinusoidal" else None
        y = x + (point["learned"][where] if place is None else place)
        y = np.where(ids[..., None] < 0, 0.0, y)
        return float(np.sum(readout * np.sin(y)))

    points: list[Point] = [
        {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    check_first_order(function, oracle, points[0])
    check_second_order(function, oracle, points[0])
    if positions == "learned":
        check_vmap_of_derivatives(function, oracle, points)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint32", "int64"])
def test_ids_of_any_integer_dtype(dtype):
    layer = token_embedding("none")
    with enable_x64(dtype == "int64"):
        tokens = jnp.asarray([1, 10, 0], dtype)
        np.testing.assert_array_equal(
            compiled()(layer, tokens), np.asarray(layer.table.weight)[[1, 10, 0]]
        )


def test_dropout_acts_on_the_sum():
    layer = token_embedding("sinusoidal", dropout_p=0.5)
    plain = token_embedding("sinusoidal")
    tokens = jnp.asarray([[1, 2, 3]] * 40)
    random = eqx.filter_jit(lambda layer, x, key: layer(x, key=key))
    y = np.asarray(random(layer, tokens, jax.random.key(0)))
    kept = y != 0
    assert stats.binomtest(int(kept.sum()), y.size, 0.5).pvalue > 1e-3
    want = compiled()(plain, tokens)
    assert_close(y[kept], 2 * wide(want)[kept], dtype="float32")
    off = eqx.nn.inference_mode(layer)
    np.testing.assert_array_equal(compiled()(off, tokens), want)
    # A stream has none.
    x, _ = streamed()(layer, tokens, layer.init_cache((40,)))
    assert_close(x, want, dtype="float32")


@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_a_token_embedding_in_bfloat16(positions):
    layer = token_embedding(positions, scale=True, dtype=jnp.bfloat16)
    tokens = np.asarray([[1, 2, 10, 0]])
    y = compiled()(layer, jnp.asarray(tokens))
    assert y.dtype == jnp.bfloat16
    assert_rounded(y, embedded(layer, tokens, np.asarray([[0, 1, 2, 3]])), length=TERMS)


def test_tied_scores():
    layer, x = token_embedding(), jnp.ones((2, 5))
    want = np.ones((2, 5)) @ wide(layer.table.weight).T
    assert_close(layer.attend(x), want, dtype="float32", length=5)
    bytes_ = filled(ByteEmbedding, 5, 1, **NUMBERS)
    want = np.ones((2, 5)) @ wide(bytes_.table.weight).T
    assert_close(bytes_.attend(x), want, dtype="float32", length=5)


def test_learned_positions_do_not_decay():
    mask: Any = weight_decay_mask(token_embedding())
    assert mask.table.weight is True
    assert mask.learned.weight is False


def test_a_step_of_an_optimiser_moves_only_the_rows_that_were_read():
    layer = token_embedding(scale=True)
    tokens = jnp.asarray([[3, 7, 7]])
    slope = eqx.filter_grad(lambda m: jnp.sum(m(tokens) ** 2))
    gradient = eqx.filter_jit(slope)(layer)
    step = optax.sgd(0.1)
    updates, _ = step.update(gradient, step.init(eqx.filter(layer, eqx.is_array)))
    moved = eqx.apply_updates(layer, updates)
    rows = np.any(wide(moved.table.weight) != wide(layer.table.weight), axis=1)
    np.testing.assert_array_equal(np.flatnonzero(rows), [3, 7])
    places = np.any(wide(moved.learned.weight) != wide(layer.learned.weight), axis=1)
    np.testing.assert_array_equal(np.flatnonzero(places), [0, 1, 2])


@given(data=st.one_of(st.binary(max_size=20), st.text(max_size=10)))
def test_bytes_there_and_back(data):
    want = data.encode() if isinstance(data, str) else data
    for num_special in (0, 3):
        layer = byte_embedding(num_special)
        ids = layer.encode(data)
        assert ids.dtype == ("int32" if num_special else "uint8")
        assert ids.tolist() == list(want)
        assert layer.decode(ids) == want


@functools.cache
def byte_embedding(num_special):
    return filled(ByteEmbedding, 4, num_special, **NUMBERS)


def test_special_ids():
    layer = byte_embedding(3)
    assert layer.vocab_size == 259
    ids = np.concatenate([[256], layer.encode("añ"), [258, 257]]).astype("int32")
    assert layer.decode(ids) == "añ".encode()
    assert layer.decode(jnp.asarray(ids)) == "añ".encode()
    np.testing.assert_array_equal(
        compiled()(layer, jnp.asarray(ids)), np.asarray(layer.table.weight)[ids]
    )


def test_every_byte_has_its_row():
    layer = byte_embedding(0)
    every = jnp.arange(256).astype("uint8")
    np.testing.assert_array_equal(compiled()(layer, every), layer.table.weight)
    # No byte is outside, so nothing is checked at run time.
    assert "callback" not in str(jax.make_jaxpr(layer)(every))


OUTSIDE = [
    (token_embedding("none"), [3, 11], "int32", "between 0 and 10"),
    (token_embedding("none"), [-1, 3], "int32", "`tokens`"),
    (token_embedding("none"), [3, -128], "int8", "`vocab_size`"),
    (token_embedding("none"), [255], "uint8", "between 0 and 10"),
    # As int32 this one would be id 2.
    (token_embedding("none"), [2**32 + 2], "int64", "between 0 and 10"),
    (byte_embedding(0), [256], "int32", "`num_special`"),
    (byte_embedding(2), [258], "uint16", "between 0 and 257"),
    (filled(LearnedPositions, 4, 2, **NUMBERS), [0, 4], "int32", "`max_len`"),
    (filled(LearnedPositions, 4, 2, **NUMBERS), [-1], "int32", "`positions`"),
]


@pytest.mark.parametrize(("layer", "ids", "dtype", "words"), OUTSIDE)
def test_an_id_outside_is_an_error_under_jit(layer, ids, dtype, words):
    with enable_x64(dtype == "int64"), pytest.raises(RuntimeError, match=words):
        jax.block_until_ready(compiled()(layer, jnp.asarray(ids, dtype)))


def test_an_id_outside_is_an_error_everywhere():
    layer, bad = token_embedding("none"), jnp.asarray([[0, 1], [2, 11]])

    def loss(layer, tokens):
        return jnp.sum(layer(tokens) ** 2)

    for function in (layer, jax.vmap(layer), eqx.filter_jit(jax.vmap(layer))):
        with pytest.raises(RuntimeError, match="`tokens`"):
            jax.block_until_ready(function(bad))
    with pytest.raises(RuntimeError, match="`tokens`"):
        jax.block_until_ready(eqx.filter_jit(eqx.filter_grad(loss))(layer, bad))
    with pytest.raises(RuntimeError, match="`tokens`"):
        jax.block_until_ready(layer.step(bad[1], layer.init_cache((2,))))


def test_a_stream_longer_than_the_learned_positions_is_an_error():
    layer = token_embedding()
    tokens = jnp.zeros((LONGEST,), "int32")
    _, cache = streamed()(layer, tokens, layer.init_cache())
    step = eqx.filter_jit(lambda layer, x, cache: layer.step(x, cache))
    with pytest.raises(RuntimeError, match="between 0 and 11"):
        jax.block_until_ready(step(layer, tokens[0], cache))
    # Two documents of half the length are none.
    longer = jnp.zeros((2 * LONGEST,), "int32")
    ids = jnp.arange(2 * LONGEST, dtype=jnp.int32) // LONGEST
    assert np.all(np.isfinite(packed()(layer, longer, ids)))
    # jax 0.7 may notice outside of Equinox's reach, which makes it a ValueError.
    with pytest.raises((RuntimeError, ValueError), match="LearnedPositions"):
        jax.block_until_ready(packed()(layer, longer, jnp.zeros_like(ids)))
