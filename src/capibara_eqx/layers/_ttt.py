"""Linear models that learn while a sequence is read, one gradient step a mini-batch.

The gradients of a mini-batch are all taken at the weights it starts with, so that each
is an outer product of a key and an error, and what the weights of a token say to a
query is attention within the mini-batch: the dual form. No token's weights are made.

A scan walks over chunks of as many tokens as a mini-batch has. Mini-batches begin where
documents do and where a cache ended, so that a chunk may hold the end of one and the
beginning of the next, and documents that start in it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..internal import accumulator_dtype
from ._contain import contained


class FastWeights(eqx.Module):
    """Models in the middle of a mini-batch.

    The weights that it started with, the sum of its gradients, each times the rate of
    its token, and how many tokens of it were read. A whole one is taken in at once.
    """

    weights: Float[Array, "*batch n_heads d_in d_out"]
    gradient: Float[Array, "*batch n_heads d_in d_out"]
    count: Int[Array, "*batch"]


def start_fast_weights(
    start: Float[Array, "n_heads d_in d_out"], batch_shape: tuple[int, ...]
) -> FastWeights:
    """Models that have read nothing."""
    start = start.astype(accumulator_dtype(start.dtype))
    weights = jnp.broadcast_to(start, (*batch_shape, *start.shape))
    count = jnp.zeros(batch_shape, jnp.int32)
    return FastWeights(weights, jnp.zeros_like(weights), count)


def ttt(
    q: Float[Array, "*batch seq n_heads d_in"],
    k: Float[Array, "*batch seq n_heads d_in"],
    target: Float[Array, "*batch seq n_heads d_out"],
    rate: Float[Array, "*batch seq n_heads"],
    schedule: Float[Array, " mini_batch_size"],
    start: Float[Array, "n_heads d_in d_out"],
    model: Callable[[Array], Array],
    *,
    state: FastWeights | None = None,
    valid: Bool[Array, "*batch seq"] | None = None,
    restart: Bool[Array, "*batch seq"] | None = None,
) -> tuple[Float[Array, "*batch seq n_heads d_out"], FastWeights]:
    r"""Mini-batch gradient descent on a sequence, and what the weights say on the way.

    $$y_t = W_t^\top q_t, \qquad
    W_t = W_s - c_{t-s} \sum_{r=s}^{t} \eta_r \nabla_r, \qquad
    \nabla_r = \nabla_{W_s} |f(W_s^\top k_r) - v_r|^2$$

    where the mini-batch of $t$ begins at token $s$, and $W_s$ is what the one before
    ended with, `start` for the first one of a document.

    **Arguments:**

    - `q`, `k`, `target`, `rate`: $q$, $k$, $v$ and $\eta$ of each token.
    - `schedule`: $c$; its length is that of a mini-batch.
    - `start`: the weights that a document starts with, one matrix a head.
    - `model`: $f$, on `(*batch, seq, n_heads, d_out)`, token by token.
    - `state`: what was read before; nothing if not given.
    - `valid`: which tokens are not padding; all if not given.
    - `restart`: where a document starts that is not the first one.

    **Returns:**

    $y$, and the models after the last valid token, in float32 or wider.
    """
    dtype = accumulator_dtype(*(v.dtype for v in (q, k, target, rate, start)))
    rules = _Rules(
        *(schedule.astype(dtype), start.astype(dtype), model),
        # Where nothing was read before, chunks are mini-batches: the form for training.
        aligned=state is None and valid is None,
    )
    batch = q.shape[:-3]
    before = start_fast_weights(start, batch) if state is None else state
    valid = jnp.ones(q.shape[:-2], jnp.bool_) if valid is None else valid

    def run(q, written, log_decay, state):
        del log_decay
        q, k, target, rate = (v.astype(dtype) for v in (q, *written))
        weights, gradient = state
        tokens = _Tokens(q, k, target, rate, valid, restart)
        return _read(rules, FastWeights(weights, gradient, before.count), tokens)

    entering = (before.weights, before.gradient)
    return contained(run, q, (k, target, rate), None, entering, restart)


def _read(rules, before, tokens) -> tuple[Array, FastWeights]:
    """Walks over the chunks of a row."""
    *batch, seq, _, _ = tokens.target.shape
    rows, length = math.prod(batch), min(seq, rules.schedule.shape[0])
    chunks = -(-seq // length)

    def chunked(v) -> Any:
        """`(chunk, row, token, ...)`, with padding behind the last token."""
        v = v.reshape(rows, seq, *v.shape[len(batch) + 1 :])
        behind = [(0, 0), (0, chunks * length - seq), *[(0, 0)] * (v.ndim - 2)]
        v = jnp.pad(v, behind).reshape(rows, chunks, length, *v.shape[2:])
        return jnp.moveaxis(v, 1, 0)

    parts = jax.tree.map(chunked, tokens)
    read = partial(_chunk, rules)
    before = jax.tree.map(lambda v: v.reshape(rows, *v.shape[len(batch) :]), before)
    before = _typed(before, parts)
    if chunks == 1:
        after, y = read(before, jax.tree.map(lambda v: v[0], parts))
    else:
        after, y = jax.lax.scan(jax.checkpoint(read), before, parts)
        y = jnp.moveaxis(y, 0, 1)
    y = y.reshape(rows, chunks * length, *y.shape[-2:])[:, :seq]
    after = jax.tree.map(lambda v: v.reshape(*batch, *v.shape[1:]), after)
    return y.reshape(tokens.target.shape), after


class _Tokens(NamedTuple):
    q: Float[Array, "*chunk row seq n_heads d_in"]
    k: Float[Array, "*chunk row seq n_heads d_in"]
    target: Float[Array, "*chunk row seq n_heads d_out"]
    rate: Float[Array, "*chunk row seq n_heads"]
    valid: Bool[Array, "*chunk row seq"]
    restart: Bool[Array, "*chunk row seq"] | None


class _Rules(NamedTuple):
    """What all chunks have in common, and whether they are the mini-batches."""

    schedule: Float[Array, " mini_batch_size"]
    start: Float[Array, "n_heads d_in d_out"]
    model: Callable[[Array], Array]
    aligned: bool


def _typed(state: FastWeights, tokens: _Tokens) -> FastWeights:
    """The state of a scan over `tokens`; see `kernels._carry.start_of`."""
    zeros = jnp.zeros_like(tokens.k[0, :, 0])[..., None]
    return FastWeights(
        state.weights.astype(zeros.dtype) + zeros,
        state.gradient.astype(zeros.dtype) + zeros,
        state.count + jnp.zeros_like(tokens.valid[0, :, 0], jnp.int32),
    )


def _chunk(rules: _Rules, state: FastWeights, tokens: _Tokens):
    """Reads a chunk, which is no longer than a mini-batch."""
    q, k, last = tokens.q, tokens.k, rules.schedule[-1]
    part, slot = _places(state.count, tokens, rules.schedule.shape[0])
    factor = rules.schedule[slot]
    rate = jnp.where(tokens.valid[..., None], tokens.rate, 0)[..., None]

    def starting(x):
        """What the weights that the chunk or a document in it starts with say to x."""
        y = _product(x, state.weights)
        if tokens.restart is None:
            return y
        fresh = jnp.einsum("rthi,hio->rtho", x, rules.start)
        return jnp.where((part >= 2)[..., None, None], fresh, y)

    def errors(y):
        prediction, pull = jax.vjp(rules.model, y)
        return rate * pull(2 * (prediction - tokens.target))[0]

    heard = starting(k)
    error = errors(heard)
    own = jnp.tril(part[:, :, None] == part[:, None])
    weights = jnp.where(own, factor[..., None], 0)
    before = jnp.where(part == 0, factor, 0)
    if _crosses(rules, tokens):
        # The second mini-batch starts with what the first one has learned.
        inherits = jnp.where(part == 1, last, 0)
        inherited = inherits[..., None] * (part == 0)[:, None].astype(last.dtype)
        heard = heard - _attend(k, k, inherited, error)
        heard = heard - _scaled(inherits, _product(k, state.gradient))
        error = errors(heard)
        weights, before = weights + inherited, before + inherits
    y = starting(q) - _attend(q, k, weights, error)
    if not rules.aligned:
        y = y - _scaled(before, _product(q, state.gradient))
    return _closed(_after(rules, state, tokens, part, error), rules), y


def _crosses(rules: _Rules, tokens: _Tokens) -> bool:
    """Whether a mini-batch may end inside of a chunk."""
    return not rules.aligned and tokens.valid.shape[-1] > 1


def _closed(state: FastWeights, rules: _Rules) -> FastWeights:
    """At the start of a new mini-batch if one was read whole."""
    full = state.count >= rules.schedule.shape[0]
    stepped = state.weights - rules.schedule[-1] * state.gradient
    return FastWeights(
        jnp.where(full[:, None, None, None], stepped, state.weights),
        jnp.where(full[:, None, None, None], 0, state.gradient),
        jnp.where(full, 0, state.count),
    )


def _places(
    count: Int[Array, " row"], tokens: _Tokens, size: int
) -> tuple[Int[Array, "row seq"], Int[Array, "row seq"]]:
    """The mini-batch of each token and its place in it.

    Mini-batch 0 is the one that the chunk starts in, 1 the next one of the same
    document; the ones of documents that start in the chunk have even numbers from 2.
    """
    index = jnp.maximum(jnp.cumsum(tokens.valid, axis=1, dtype=jnp.int32) - 1, 0)
    place = count[:, None] + index
    if tokens.restart is None:
        return place // size, place % size
    document = jnp.cumsum(tokens.restart, axis=1, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(tokens.restart, index, 0), axis=1)
    place = jnp.where(document == 0, place, index - first)
    return 2 * document + place // size, place % size


def _after(rules, state, tokens, part, error) -> FastWeights:
    """The models after the last valid token of the chunk."""
    final = jnp.max(jnp.where(tokens.valid, part, 0), axis=1)
    ending = tokens.valid & (part == final[:, None])
    weights, gradient, count = state.weights, state.gradient, state.count
    place = final[:, None, None, None]
    if _crosses(rules, tokens):
        learned = gradient + _outer(tokens.k, error, part == 0)
        weights = jnp.where(place == 1, weights - rules.schedule[-1] * learned, weights)
    if tokens.restart is not None:
        weights = jnp.where(place >= 2, rules.start[None], weights)
    gradient = jnp.where(place == 0, gradient, 0)
    count = jnp.where(final == 0, count, 0)
    return FastWeights(
        weights,
        gradient + _outer(tokens.k, error, ending),
        count + jnp.sum(ending, axis=1, dtype=jnp.int32),
    )


def _product(x, weights) -> Float[Array, "row seq n_heads d_out"]:
    return jnp.einsum("rthi,rhio->rtho", x, weights)


def _attend(x, k, factors, values) -> Float[Array, "row seq n_heads d_out"]:
    """What the outer products of `k` and `values` say to `x`, each times a factor."""
    scores = jnp.einsum("rthi,rshi->rhts", x, k) * factors[:, None]
    return jnp.einsum("rhts,rsho->rtho", scores, values)


def _outer(k, values, chosen) -> Float[Array, "row n_heads d_in d_out"]:
    return jnp.einsum("rthi,rtho->rhio", k, _scaled(chosen.astype(k.dtype), values))


def _scaled(factor, y) -> Float[Array, "row seq n_heads d_out"]:
    return factor[..., None, None] * y
