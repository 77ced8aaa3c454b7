"""What every layer owes: batch axes, streaming, causality. The cases are a table."""

import math

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.layer_cases import (
    LENGTH,
    ROOM,
    call,
    chunks,
    close,
    each,
    fresh,
    inputs,
    layer_of,
    packed_rows,
    prefill,
    root_mean_square,
    run,
    seeds,
    step,
)

from capibara_eqx.layers import AbstractSequenceMixer, Bidirectional, PatchEmbedding


def everything(layer, x, ids, x_next):
    """All that a mixer computes: a call, a prefill, a step."""
    batch = x_next.shape[: ids.ndim - 1]
    y, cache = prefill(layer, x, layer.init_cache(batch, max_len=ROOM), ids)
    return call(layer, x, ids), y, cache, *step(layer, x_next, cache)


def call_vmapped(layer, x, *ids):
    axes = ids[0].ndim - 1 if ids else x.ndim - 1
    if not ids and isinstance(layer, AbstractSequenceMixer | Bidirectional):
        axes -= 1  # the sequence
    if isinstance(layer, PatchEmbedding):
        axes -= 2  # channels and height

    def rows(x, *ids):
        return call(layer, x, *ids)

    for _ in range(axes):
        rows = jax.vmap(rows)
    return rows(x, *ids)


def row_by_row(case, x, ids, x_next):
    """What `everything` gives, from functions of one row."""
    y, cache = run(case, prefill, x, fresh(case), ids)
    return run(case, call, x, ids), y, cache, *run(case, step, x_next, cache)


def row_of(case, results, row):
    """One row of what `everything` gives; caches may have a layer axis in front."""

    def take(leaf):
        return leaf[row]

    def take_cache(leaf):
        return leaf[(*[slice(None)] * case.cache_axes, *row)]

    called, read, cache, stepped, after = results
    caches = jax.tree.map(take_cache, (cache, after))
    return take(called), take(read), caches[0], take(stepped), caches[1]


def batches(batch):
    rows = st.lists(packed_rows, min_size=math.prod(batch), max_size=math.prod(batch))
    return rows.map(lambda rows: np.reshape(rows, (*batch, LENGTH)).astype("int32"))


@each("mixer")
@given(ids=st.sampled_from([(3,), (2, 2)]).flatmap(batches), seed=seeds)
def test_batch_axes_are_rows_on_their_own(case, ids, seed):
    *batch, _ = ids.shape
    x = inputs(case, ids.shape, seed)
    x_next = inputs(case, tuple(batch), seed + 1)
    got = run(case, everything, x, ids, x_next)
    vmapped = run(case, call_vmapped, x, ids)
    for row in np.ndindex(*batch):
        *rest, stepped, after = row_of(case, got, row)
        want = row_by_row(case, x[row], ids[row], x_next[row])
        close(case, (*rest, after), (*want[:3], want[4]), f"row {row}")
        # The output of one token may be small where its terms cancel.
        terms = root_mean_square(got[0])
        close(case, stepped, want[3], f"row {row}, a step", terms=terms)
        close(case, vmapped[row], want[0], f"row {row} under vmap")


@each("mixer")
def test_a_batch_may_have_no_rows(case):
    """Traced only: what fails there are shapes."""
    x, ids = inputs(case, (2, 0, LENGTH), 0), np.zeros((2, 0, LENGTH), "int32")
    # Made outside: it is kept for other tests, which cannot take what is traced.
    layer = layer_of(case)

    def both(x, ids):
        return call(layer, x), call(layer, x, ids)

    plain, packed = jax.eval_shape(both, x, ids)
    assert plain.shape == packed.shape
    assert plain.shape[:-1] == ids.shape


@each("pointwise")
@given(
    shape=st.sampled_from([(2,), (3, 2)]),
    function=st.sampled_from([call, call_vmapped]),
    seed=seeds,
)
def test_pointwise_layers_take_any_axes(case, shape, function, seed):
    x = inputs(case, (*shape, *case.axes), seed)
    got = run(case, function, x)
    terms = root_mean_square(run(case, call, inputs(case, (3, 2, *case.axes), 0)))
    for index in np.ndindex(shape):
        want = run(case, call, x[index])
        close(case, got[index], want, f"element {index}", terms=terms)


@each("mixer")
@given(cuts=chunks, seed=seeds)
def test_call_is_prefill_is_any_split(case, cuts, seed):
    x = inputs(case, (LENGTH,), seed)
    want = run(case, call, x)
    whole, want_cache = run(case, prefill, x, fresh(case))
    close(case, whole, want, "prefill")
    cache, parts = fresh(case), []
    for start, stop in cuts:
        y, cache = run(case, prefill, x[start:stop], cache)
        parts.append(y)
    close(case, np.concatenate(parts), want, "outputs of the chunks")
    close(case, cache, want_cache, "cache after the chunks")


@each("mixer")
@given(first=st.integers(0, LENGTH - 1), seed=seeds)
def test_call_is_a_loop_of_step(case, first, seed):
    x = inputs(case, (LENGTH,), seed)
    want = run(case, call, x)
    _, want_cache = run(case, prefill, x, fresh(case))
    cache = fresh(case)
    if first > 0:
        _, cache = run(case, prefill, x[:first], cache)
    for t in range(first, LENGTH):
        y, cache = run(case, step, x[t], cache)
        close(case, y, want[t], f"step {t}", terms=root_mean_square(want))
    close(case, cache, want_cache, "cache after the steps")


@each("mixer")
@given(at=st.integers(0, LENGTH - 1), seed=seeds)
def test_no_output_sees_a_later_token(case, at, seed):
    x = inputs(case, (LENGTH,), seed)
    other = (x[at] + 1) % 7 if case.tokens else x[at] + 1.0
    before, after = run(case, call, x), run(case, call, x.at[at].set(other))
    if case.exact:
        np.testing.assert_array_equal(after[:at], before[:at])
    else:
        close(case, after[:at], before[:at], "outputs in front of the token")
    assert np.any(np.abs(after[at] - before[at]) > 1e-4), "the token has no effect"
    if case.remembers and at == 0:
        assert np.any(after[at + 1 :] != before[at + 1 :]), "nothing is remembered"
