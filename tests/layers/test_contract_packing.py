"""What every sequence mixer owes to packed documents and to padding."""

import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from support.layer_cases import (
    LENGTH,
    call,
    close,
    each,
    floats,
    fresh,
    inputs,
    packed_rows,
    pieces,
    prefill,
    run,
    seeds,
    step,
)
from support.numpy_oracles import documents


def as_ids(row):
    return jnp.asarray(row, "int32")


def both_ways(case, x, row):
    """Outputs and cache of a packed row; the call and the prefill agree on them."""
    y, cache = run(case, prefill, x, fresh(case), as_ids(row))
    close(case, run(case, call, x, as_ids(row)), y, "call with segment_ids")
    return y, cache


@each("mixer")
@given(row=packed_rows, seed=seeds)
@example(row=[5, 2, 2, 5, 5, 9], seed=1)  # an id comes back, documents of one token
@example(row=[-1, -1, 4, 4, 4, 4], seed=2)  # padding on the left
@example(row=[4, 4, 4, 4, -1, -9], seed=3)  # on the right
@example(row=[4, 4, -1, -1, 6, 6], seed=4)  # between two documents
@example(row=[4, -1, 4, -1, -1, 4], seed=5)  # inside a document
@example(row=[-1] * LENGTH, seed=6)  # nothing else
def test_packed_documents_are_separate_ones(case, row, seed):
    x, x_next = inputs(case, (LENGTH,), seed), inputs(case, (), seed + 1)
    y, cache = both_ways(case, x, row)
    want_cache = fresh(case)
    for positions in documents(np.asarray(row)):
        want, want_cache = run(case, prefill, x[np.asarray(positions)], fresh(case))
        close(case, y[positions], want, f"document at {positions}")
    close(case, floats(cache), floats(want_cache), "cache of the last document")
    # The next token without an id belongs to the last document.
    got, cache = run(case, step, x_next, cache)
    want, want_cache = run(case, step, x_next, want_cache)
    close(case, got, want, "step after the row")
    close(case, floats(cache), floats(want_cache), "cache after the step")


@each("mixer")
@given(row=packed_rows, seed=seeds)
@example(row=[-1, 4, -1, 4, 6, -1], seed=1)
def test_outputs_at_padding(case, row, seed):
    x = inputs(case, (LENGTH,), seed)
    y, _ = both_ways(case, x, row)
    padding = np.asarray(row) < 0
    if case.padding == "zero":
        assert not np.any(y[padding])
    if case.padding == "input":
        np.testing.assert_array_equal(y[padding], x[padding])
    # What stands at padding has no effect on anything else.
    other = jnp.where(padding[:, None] if not case.tokens else padding, x * 0 + 1, x)
    after, _ = both_ways(case, other, row)
    np.testing.assert_array_equal(after[~padding], y[~padding])


@each("mixer")
@given(row=packed_rows, cuts=pieces, seed=seeds)
@example(row=[5, 5, 5, 5, 5, 5], cuts=[(0, 1), (1, 2), (2, 4), (4, 6)], seed=1)
@example(row=[5, 5, 3, 3, 5, 5], cuts=[(0, 2), (2, 4), (4, 6)], seed=2)
@example(row=[5, -1, -1, 5, -1, 3], cuts=[(0, 2), (2, 4), (4, 5), (5, 6)], seed=3)
def test_a_packed_row_in_pieces_is_the_row(case, row, cuts, seed):
    x = inputs(case, (LENGTH,), seed)
    want, want_cache = both_ways(case, x, row)
    cache, parts = fresh(case), []
    for start, stop in cuts:
        y, cache = run(case, prefill, x[start:stop], cache, as_ids(row[start:stop]))
        parts.append(y)
    close(case, np.concatenate(parts), want, "outputs of the pieces")
    close(case, cache, want_cache, "cache after the pieces")
