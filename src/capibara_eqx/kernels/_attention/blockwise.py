import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...internal import accumulator_dtype
from .._carry import start_of
from ._visibility import Visibility, grouped
from .reference import Dropping, kept


# Queries and keys of a block.
_BLOCK = (256, 256)


def attention(
    query: Float[Array, "*batch query heads d"],
    key: Float[Array, "*batch key kv_heads d"],
    value: Float[Array, "*batch key kv_heads v"],
    seen: Visibility,
    scale: float,
    dropping: Dropping | None,
) -> Float[Array, "*batch query heads v"]:
    """`kernels.attention`, a block of queries with a block of keys at a time.

    The softmax is carried along: highest score, sum and weighted values so far. Its
    logarithmic sum is kept for the derivative, which computes the weights of a block
    again. A derivative is a sum over blocks, linear in the tangents; the transpose
    of that sum is the backward pass.
    """
    *batch, queries, heads, d = query.shape
    keys, kv_heads = key.shape[-3:-1]
    sizes = tuple(
        _size(length, most)
        for length, most in zip((queries, keys), _BLOCK, strict=True)
    )
    seen = seen.padded(-queries % sizes[0], -keys % sizes[1])
    q = query.reshape(*batch, queries, kv_heads, heads // kv_heads, d)
    q = _into_blocks(jnp.moveaxis(q, -4, -2), sizes[0])
    k, v = (_into_blocks(jnp.moveaxis(x, -3, -2), sizes[1]) for x in (key, value))
    out, _ = _attend(scale, q, k, v, seen, dropping)
    out = jnp.moveaxis(out, 0, -3)  # (*batch, kv_heads, group, blocks, block, v)
    blocks, block, v_dim = out.shape[-3:]
    out = out.reshape(*out.shape[:-3], blocks * block, v_dim)[..., :queries, :]
    return jnp.moveaxis(out, -2, -4).reshape(*batch, queries, heads, v_dim)


def _size(length: int, most: int) -> int:
    """Of blocks as even as can be, of at most `most` tokens."""
    return -(-length // -(-length // most))


def _into_blocks(x, size):
    """`(..., length, d)` as `(blocks, ..., size, d)`, padded with zeros."""
    *lead, length, d = x.shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -length % size), (0, 0)])
    return jnp.moveaxis(x.reshape(*lead, x.shape[-2] // size, size, d), -3, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, seen, dropping):
    """Results and logarithms of the softmax's sums, both by blocks of queries.

    Blocks of queries are `(blocks, *batch, kv_heads, group, block, d)`, of keys and
    values `(blocks, *batch, kv_heads, block, d)`.
    """
    dtype = accumulator_dtype(q.dtype)
    lowest = jnp.finfo(dtype).min

    def of_queries(i, q):
        zeros = _zeros(dtype, q, k, v, seen, dropping)
        acc = jnp.broadcast_to(zeros[..., None], (*zeros.shape, v.shape[-1]))
        start = (zeros + lowest, zeros, acc)

        def add(visible, carry, j, k, v):
            highest, total, acc = carry
            scores = _scores(q, k, scale, dtype)
            seen_scores = jnp.where(visible, scores, lowest)
            higher = jnp.maximum(highest, jnp.max(seen_scores, axis=-1))
            fade = jnp.exp(highest - higher)
            weights = _weights(scores, visible, higher)
            total = total * fade + jnp.sum(weights, axis=-1)
            weights = _dropped(weights, dropping, i, j)
            return higher, total, acc * fade[..., None] + _values(weights, v)

        def block(carry, keys):
            return _where_seen(seen, i, q, add, carry, *keys), None

        carry, _ = jax.lax.scan(block, start, (jnp.arange(k.shape[0]), k, v))
        highest, total, acc = carry
        # A sum of zero: nothing is seen. The weights are zero whatever stands here.
        some = total > 0
        total = jnp.where(some, total, 1)
        log_sum = jnp.where(some, highest, 0) + jnp.log(total)
        return (acc / total[..., None]).astype(q.dtype), log_sum

    return jax.lax.map(lambda xs: of_queries(*xs), (jnp.arange(q.shape[0]), q))


@_attend.defjvp
def _attend_jvp(scale, primals, tangents):
    """With w = exp(s - log_sum) held together by a constant `log_sum`, the sums

        total = sum w = 1   and   acc = sum w v = out

    have the tangents that the logarithm and, but for its share of the total, the result
    have. Linearised as a whole, for jax 0.7 transposes no scan over tangents that
    differentiation did not make.
    """
    q, k, v, seen, dropping = primals
    out, log_sum = _attend(scale, *primals)

    def sums(q, k, v):
        return _sums(scale, q, k, v, seen, dropping, log_sum)

    _, tangent_of = jax.linearize(sums, q, k, v)
    total, acc = tangent_of(*tangents[:3])
    out_dot = acc - total[..., None] * out.astype(acc.dtype)
    return (out, log_sum), (out_dot.astype(q.dtype), total)


def _sums(scale, q, k, v, seen, dropping, log_sum):
    """The sums of the weights and of the weighted values, by blocks of queries."""
    dtype = accumulator_dtype(q.dtype)

    # Of the weights and of all that is summed nothing is kept for a derivative.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_queries(i, q, log_sum):
        def add(visible, carry, j, k, v):
            weights = _weights(_scores(q, k, scale, dtype), visible, log_sum)
            total, acc = carry
            total = total + jnp.sum(weights, axis=-1)
            return total, acc + _values(_dropped(weights, dropping, i, j), v)

        # The weights of a block are computed again when they are needed again, or
        # all scores would be kept.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(carry, keys):
            return _where_seen(seen, i, q, add, carry, *keys), None

        zeros = _zeros(dtype, q, k, v, seen, dropping)
        acc = jnp.broadcast_to(zeros[..., None], (*zeros.shape, v.shape[-1]))
        sums, _ = jax.lax.scan(block, (zeros, acc), (jnp.arange(k.shape[0]), k, v))
        return sums

    rows = (jnp.arange(q.shape[0]), q, log_sum)
    return jax.lax.map(lambda xs: of_queries(*xs), rows)


def _zeros(dtype, q, k, v, seen, dropping):
    """One a query and head, typed like what is summed there (see `start_of`)."""
    rows = q.shape[:-1]
    of_tokens = (seen.query_positions, seen.query_segments, seen.key_segments)
    tokens = [x for x in (*of_tokens, seen.key_positions) if x is not None]
    entering = [
        q[..., 0],
        *(x[0][..., None, :1, 0] for x in (k, v)),
        *(x[..., None, None, :1] for x in tokens),
    ]
    if seen.mask is not None:
        entering.append(seen.mask[..., :1, :1, :1])
    if dropping is not None:
        entering.append(jnp.broadcast_to(dropping[0], (1,) * len(rows)))
    return start_of(None, rows, dtype, *entering)


def _where_seen(seen, i, q, add, carry, j, k, *rest):
    """`add(visible, carry, j, k, *rest)` unless block `i` sees nothing of block `j`."""
    size = (q.shape[-2], k.shape[-2])
    block = seen.block(i * size[0], j * size[1], size)

    def seen_of(block, carry, j, k, *rest):
        visible = block.pairs()
        if visible is None:
            visible = jnp.ones((1,) * q.ndim, bool)
        else:
            visible = grouped(visible, k.shape[-3])
        return add(visible, carry, j, k, *rest)

    possible = block.possible()
    if possible is None:
        return seen_of(block, carry, j, k, *rest)
    return jax.lax.cond(
        possible, seen_of, lambda _, carry, *__: carry, block, carry, j, k, *rest
    )


def _scores(q, k, scale, dtype):
    pattern = "...hgqd,...hkd->...hgqk"
    return jnp.einsum(pattern, q, k, preferred_element_type=dtype) * scale


def _weights(scores, visible, log_sum):
    """Softmax weights before division, zero where nothing is seen."""
    # Twice `where`: what is not seen may overflow, and infinity times zero is NaN.
    exponents = jnp.where(visible, scores - log_sum[..., None], 0)
    return jnp.where(visible, jnp.exp(exponents), 0)


def _values(weights, v):
    weights, dtype = weights.astype(v.dtype), weights.dtype
    pattern = "...hgqk,...hkv->...hgqv"
    return jnp.einsum(pattern, weights, v, preferred_element_type=dtype)


def _dropped(weights, dropping, i, j):
    if dropping is None:
        return weights
    p, key = dropping
    key = jax.random.fold_in(jax.random.fold_in(key, i), j)
    return weights * kept((p, key), weights.shape, weights.dtype)
