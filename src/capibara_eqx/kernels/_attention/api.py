import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...internal import (
    check_kind,
    check_probability,
    check_shape,
    check_size,
    promote_dtypes,
)
from .._dispatch import dispatch
from . import blockwise, one_query, reference, xla
from ._visibility import Visibility


BACKENDS = {
    "xla": xla.attention,
    "blockwise": blockwise.attention,
    "one_query": one_query.attention,
    "cudnn": xla.cudnn,
    "reference": reference.attention,
}
# What serves at most sizes, see `_default`.
DEFAULT = "blockwise"
# Why an implementation does not run on the platform at hand.
REASONS = {"cudnn": xla.unavailable}

# Scores a call up to which all of them at once are faster than blocks on CPU.
_SCORES_AT_ONCE = 2**20


def attention(
    query: Float[Array, "*batch query heads d"],
    key: Float[Array, "*batch key kv_heads d"],
    value: Float[Array, "*batch key kv_heads v"],
    *,
    is_causal: bool = False,
    window: int | None = None,
    mask: Bool[Array, "*batch #heads #query #key"] | None = None,
    query_positions: Int[Array, "*batch query"] | None = None,
    key_positions: Int[Array, "*batch key"] | None = None,
    query_segments: Int[Array, "*batch query"] | None = None,
    key_segments: Int[Array, "*batch key"] | None = None,
    scale: float | None = None,
    dropout_p: float | Float[Array, ""] = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*batch query heads v"]:
    r"""Scaled dot-product attention of grouped heads.

    $$y_i = \sum_j \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} v_j, \quad
    s_{ij} = \mathrm{scale}\; q_i \cdot k_j$$

    over the keys $j$ that query $i$ sees; a query that sees none gives zeros. Vaswani
    et al., *Attention Is All You Need*, arXiv 1706.03762; grouped heads: Ainslie et
    al., *GQA*, arXiv 2305.13245. Softmax in float32 or wider.

    `"xla"` and `"cudnn"` are `jax.nn.dot_product_attention`; `"blockwise"` never holds
    more scores than one block of queries has with one block of keys, so that memory
    is linear in the length, forward and backward (Milakov and Gimelshein, *Online
    normalizer calculation for softmax*, arXiv 1805.02867; Dao et al.,
    *FlashAttention*, arXiv 2205.14135), and skips blocks in which nothing is seen.
    `"one_query"` takes a single query, as a step from a cache has. All but `"cudnn"`
    have derivatives of any order in both modes.

    **Arguments:**

    - `query`: `(*batch, query, heads, d)`.
    - `key`, `value`: `(*batch, key, kv_heads, d)` and `(*batch, key, kv_heads, v)`;
        `kv_heads` divides `heads`, and neighbouring query heads share a key head. What
        is hidden must be finite too, for it is multiplied by zero.
    - `is_causal`: whether a query sees no key of a later position.
    - `window`: a query sees keys less than so many positions away from its own.
    - `mask`: true where a query may see a key, `(*batch, heads, query, key)`; the last
        three may be of size one.
    - `query_positions`, `key_positions`: for `is_causal` and `window`; counted from
        zero if not given. Both or neither.
    - `query_segments`, `key_segments`: a query sees keys of its own segment only;
        negative is padding, which neither sees nor is seen. Both or neither.
    - `scale`: $1 / \sqrt{d}$ if not given.
    - `dropout_p`: probability of dropping a softmax weight; the others are scaled up.
    - `dropout_key`: for the draws, needed if `dropout_p` is not 0.
    - `implementation`: `"xla"`, `"blockwise"`, `"one_query"`, `"cudnn"`,
        `"reference"`, or a sequence of names of which the first that can is used. If
        not given, `"one_query"` where it can, `"xla"` where scores are few, and
        `"blockwise"` elsewhere.

    **Returns:**

    `(*batch, query, heads, v)`, in the dtype of the arguments promoted.

    **Raises:**

    `ValueError` naming the argument that does not fit; `NotImplementedError` if the
    implementation that was named cannot serve.

    !!! example

        ```python
        q = jax.random.normal(key, (2, 128, 8, 64))
        k = v = jax.random.normal(key, (2, 128, 2, 64))
        y = attention(q, k, v, is_causal=True)         # (2, 128, 8, 64)
        ```
    """
    _check(query, key, value)
    *batch, queries, heads, d = query.shape
    keys = key.shape[-3]
    if window is not None:
        check_size("window", window)
    mask = _check_mask(mask, (*batch, heads, queries, keys))
    positions = _pair("positions", query_positions, key_positions, batch, queries, keys)
    segments = _pair("segments", query_segments, key_segments, batch, queries, keys)
    ones = (1,) * len(batch)
    q_at, k_at = positions or (
        jnp.arange(n, dtype=jnp.int32).reshape(*ones, n) for n in (queries, keys)
    )
    q_of, k_of = segments or (None, None)
    seen = Visibility(q_at, k_at, q_of, k_of, mask, is_causal, window)
    scale = 1 / math.sqrt(d) if scale is None else scale
    dtype = promote_dtypes(query.dtype, key.dtype, value.dtype)
    arrays = [x.astype(dtype) for x in (query, key, value)]
    dropping = _dropping(dropout_p, dropout_key)
    return dispatch(
        "attention",
        BACKENDS,
        implementation,
        *(*arrays, seen, scale, dropping),
        default=_default(math.prod(batch) * heads, queries, keys),
    )


def _default(rows, queries, keys):
    """What serves, by the number of scores, which are static."""
    few = rows * queries * keys <= _SCORES_AT_ONCE
    names = ("one_query",) if queries == 1 else ("xla",) if few else ()
    return {name: BACKENDS[name] for name in (*names, "blockwise")}


def _check(query, key, value) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or 0 in x.shape[-3:]:
            raise ValueError(
                f"attention: `{name}` must have shape (*batch, length, heads, width), "
                f"none of them zero, got {x.shape}."
            )
        check_kind("attention", {name: x}, jnp.floating)
    *batch, _, heads, d = query.shape
    *_, length, kv_heads, _ = key.shape
    check_shape(
        "attention",
        "key",
        key,
        (*batch, length, kv_heads, d),
        "the batch axes and the width of `query`, (*batch, key, kv_heads, d)",
    )
    check_shape(
        "attention",
        "value",
        value,
        (*batch, length, kv_heads, value.shape[-1]),
        "the batch axes, length and heads of `key`, (*batch, key, kv_heads, v)",
    )
    if heads % kv_heads != 0:
        raise ValueError(
            "attention: the heads of `key` must divide those of `query`, got "
            f"{kv_heads} and {heads}."
        )


def _check_mask(mask, full):
    if mask is None:
        return None
    fits = mask.ndim == len(full) and all(
        n in ((1, m) if i >= len(full) - 3 else (m,))
        for i, (n, m) in enumerate(zip(mask.shape, full, strict=True))
    )
    if not fits or mask.dtype != jnp.bool_:
        raise ValueError(
            "attention: `mask` must be boolean, (*batch, heads, query, key), here "
            f"{full}, the last three possibly 1; got {mask.dtype} {mask.shape}. An "
            "axis of heads that share the mask is `mask[..., None, :, :]`."
        )
    return mask


def _pair(what, query, key, batch, queries, keys):
    if query is None and key is None:
        return None
    if query is None or key is None:
        missing = "query" if query is None else "key"
        raise ValueError(
            f"attention: `{missing}_{what}` is missing; pass `query_{what}` and "
            f"`key_{what}`, or neither."
        )
    expected = {"query": (query, queries), "key": (key, keys)}
    for name, (x, length) in expected.items():
        check_shape(
            "attention",
            f"{name}_{what}",
            x,
            (*batch, length),
            f"(*batch, {name})",
            kind=jnp.integer,
        )
    return query, key


def _dropping(p, key):
    if isinstance(p, int | float):
        check_probability("dropout_p", p)
        if p == 0:
            return None
    if key is None:
        raise ValueError(
            "attention: `dropout_key` is needed while `dropout_p` is not 0. Pass a "
            "key, or leave `dropout_p` out."
        )
    return jnp.asarray(p, jnp.float32), key
