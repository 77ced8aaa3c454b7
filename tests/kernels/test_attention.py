"""Attention in every implementation, against loops in float64."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import attention_oracle
from support.derivatives import (
    check_first_order,
    check_second_order,
    check_third_order,
    check_vmap_of_derivatives,
    quick_jit,
)
from support.kernel_cases import cast, random_segment_ids, rounded, smooth_loss
from support.precision import enable_x64
from support.tolerances import assert_close, assert_rounded

from capibara_eqx.kernels import attention
from capibara_eqx.kernels._attention import blockwise
from capibara_eqx.kernels._attention.specs import TEST_SPECS, Spec


EVERY = ("reference", "xla", "blockwise")
each = pytest.mark.parametrize("implementation", EVERY)
each_wide = pytest.mark.parametrize("implementation", ["reference", "blockwise"])
OPTIONS = ("positions", "segments", "mask")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a few tokens are several blocks, with a remainder."""
    monkeypatch.setattr(blockwise, "_BLOCK", (4, 3))


def arguments(spec: Spec, options=(), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = (spec.batch,)
    positions = rng.permuted(
        np.tile(np.arange(spec.key) * 2 - 3, (spec.batch, 1)), axis=1
    )
    found: dict[str, np.ndarray] = {
        "query": rng.standard_normal((*batch, spec.query, spec.n_heads, spec.head_dim)),
        "key": rng.standard_normal((*batch, spec.key, spec.n_kv_heads, spec.head_dim)),
        "value": rng.standard_normal((*batch, spec.key, spec.n_kv_heads, spec.v_dim)),
    }
    if "positions" in options:
        found["query_positions"] = rng.integers(-2, spec.key, (*batch, spec.query))
        found["key_positions"] = rng.permuted(positions, axis=1)
    if "segments" in options:
        found["query_segments"] = random_segment_ids(rng, (*batch, spec.query))
        found["key_segments"] = random_segment_ids(rng, (*batch, spec.key))
    if "mask" in options:
        sizes = (spec.n_heads, spec.query, spec.key)
        found["mask"] = rng.random((*batch, *sizes)) < 0.6
    return {
        name: x.astype(np.int32) if x.dtype == np.int64 else x
        for name, x in found.items()
    }


@functools.cache
def compiled(implementation, **static):
    return quick_jit(
        functools.partial(attention, implementation=implementation, **static)
    )


def check(given, implementation, dtype="float32", **static):
    """The operation on these arguments is the loop's."""
    inputs = cast(given, dtype)
    got = attention_of(implementation, inputs, **static)
    want = attention_oracle.attention(**rounded(inputs), **static)
    assert got.dtype == dtype
    if dtype == "bfloat16":
        # The weights are rounded to it as well in front of the sum of values.
        assert_close(got.astype("float32"), want, dtype=dtype, factor=2.0)
    else:
        assert_close(got, want, dtype=dtype, length=given["key"].shape[-1] * 3)


def attention_of(implementation, inputs, **static):
    return compiled(implementation, **static)(**inputs)


@each
@pytest.mark.parametrize("spec", TEST_SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("options", "static"),
    [
        ((), {}),
        ((), {"is_causal": True, "scale": 0.7}),
        (OPTIONS, {"is_causal": True, "window": 4}),
    ],
    ids=["plain", "causal", "everything"],
)
def test_forward(implementation, spec, options, static):
    check(arguments(spec, options, seed=len(options)), implementation, **static)


@pytest.mark.parametrize(
    ("options", "static"),
    [((), {}), (OPTIONS, {"is_causal": True, "window": 4, "scale": 0.3})],
    ids=["plain", "everything"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_one_query(dtype, options, static):
    spec = Spec("step", 3, 1, 11, 6, 2, 3, 5)
    with enable_x64(dtype == "float64"):
        check(arguments(spec, options, seed=8), "one_query", dtype, **static)


def test_derivatives_of_one_query():
    spec = Spec("step", 2, 1, 7, 4, 2, 2, 3)
    pair = loss_pair("one_query", spec, {"is_causal": True}, OPTIONS, seed=3)
    check_first_order(*pair)
    check_second_order(*pair)


@each_wide
@pytest.mark.parametrize("spec", TEST_SPECS, ids=lambda spec: spec.name)
def test_float64_stays_float64(implementation, spec):
    given = arguments(spec, ("segments",), seed=5)
    with enable_x64(True):
        check(given, implementation, "float64", is_causal=True)


@each
def test_bfloat16_is_accumulated_in_float32(implementation):
    spec = Spec("long", 1, 6, 60, 2, 1, 16, 3)
    check(arguments(spec, seed=2), implementation, "bfloat16")
    # A constant value comes out as it is, however many weights are summed.
    given = cast(arguments(spec, seed=3), "bfloat16")
    given["value"] = jnp.full_like(given["value"], 1.5)
    got = attention_of(implementation, given)
    assert_rounded(got, np.full(got.shape, 1.5), length=60)


@each
@settings(max_examples=8)
@given(
    options=st.sets(st.sampled_from(OPTIONS)),
    is_causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_visibility(implementation, options, is_causal, window, seed):
    given = arguments(Spec("drawn", 2, 5, 7, 4, 2, 2, 3), options, seed)
    check(given, implementation, is_causal=is_causal, window=window)


@each
@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 7), (2, 4, 1, 7), (2, 4, 5, 1), (2, 1, 1, 1)], ids=str
)
def test_axes_of_a_mask_may_be_of_size_one(implementation, shape):
    given = arguments(Spec("masked", 2, 5, 7, 4, 2, 2, 3))
    given["mask"] = np.random.default_rng(0).random(shape) < 0.5
    check(given, implementation)


@each
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_batch_axes(implementation, batch):
    rows = int(np.prod(batch))
    spec = Spec("rows", rows, 5, 7, 4, 2, 2, 3)
    given = arguments(spec, OPTIONS, seed=9)
    shaped = {n: x.reshape(*batch, *x.shape[1:]) for n, x in given.items()}
    got = attention_of(implementation, cast(shaped, "float32"), is_causal=True)
    loop: Any = attention_oracle.attention
    want = loop(**given, is_causal=True)
    assert_close(got, want.reshape(got.shape), dtype="float32", length=20)


@each
def test_what_sees_nothing_is_zero_and_has_finite_gradients(implementation):
    given = cast(arguments(TEST_SPECS[1]), "float32")
    ids = np.asarray([[0, 0, -1, 1, 1, 2, -1, 4, 4]] * 2, "int32")
    keys = np.where(ids == 4, 3, ids)

    def loss(arrays):
        y = attention(
            **arrays,
            is_causal=True,
            query_segments=jnp.asarray(ids),
            key_segments=jnp.asarray(keys),
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(y)), y

    (_, y), slopes = quick_jit(jax.value_and_grad(loss, has_aux=True))(given)
    nothing = (ids < 0) | (ids == 4)
    assert not np.any(np.asarray(y)[nothing])
    assert np.all(np.any(np.asarray(y) != 0, axis=(-1, -2))[~nothing])
    for name, slope in slopes.items():
        assert np.all(np.isfinite(slope)), name
    assert not np.any(np.asarray(slopes["query"])[nothing])


@each
def test_large_scores_do_not_overflow(implementation):
    given = arguments(TEST_SPECS[1], seed=4)
    given["query"] = given["query"] * 300
    check(given, implementation, is_causal=True)


def loss_pair(implementation, spec, static, options=("segments",), seed=0):
    given = arguments(spec, options, seed)
    point = {name: given.pop(name) for name in ("query", "key", "value")}

    def function(arrays):
        known = {name: jnp.asarray(x) for name, x in given.items()}
        y = attention(**arrays, **known, **static, implementation=implementation)
        return smooth_loss(jnp, [y])

    def oracle(arrays):
        y = attention_oracle.attention(**arrays, **given, **static)
        return float(smooth_loss(np, [y]))

    return function, oracle, point


SMALL = Spec("small", 1, 5, 7, 2, 1, 2, 3)
CAUSAL = {"is_causal": True, "window": 4}


@each_wide
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "everything"])
def test_first_order(implementation, options):
    check_first_order(*loss_pair(implementation, SMALL, CAUSAL, options, seed=1))


@each_wide
def test_second_order(implementation):
    check_second_order(*loss_pair(implementation, SMALL, CAUSAL, seed=2))


def test_third_order_of_blocks():
    tiny = Spec("tiny", 1, 5, 4, 1, 1, 2, 1)
    check_third_order(*loss_pair("blockwise", tiny, {"is_causal": True}, seed=3))


def test_vmap_of_derivatives_of_blocks():
    function, oracle, point = loss_pair("blockwise", SMALL, CAUSAL, seed=4)
    other = {name: 0.7 * x for name, x in point.items()}
    check_vmap_of_derivatives(function, oracle, [point, other])


def test_derivatives_through_checkpoint_and_of_xla_are_those_of_float64():
    given = cast(arguments(SMALL, ("segments",), seed=6), "float32")
    point = {name: given.pop(name) for name in ("query", "key", "value")}

    def derivatives(implementation, keep=lambda loss: loss):
        @keep
        def loss(arrays):
            y = attention(
                **arrays, **given, is_causal=True, implementation=implementation
            )
            return jnp.sum(jnp.sin(y))

        along = lambda p: jax.tree.map(jnp.cos, p)
        return quick_jit(lambda p: jax.jvp(jax.grad(loss), (p,), (along(p),)))

    with enable_x64(True):
        wide = {
            name: jnp.asarray(np.asarray(x), "float64") for name, x in point.items()
        }
        want = derivatives("reference")(wide)
    for implementation, keep in itertools.product(
        ("xla", "blockwise"), (lambda loss: loss, jax.checkpoint)
    ):
        got = derivatives(implementation, keep)(point)
        for left, right in zip(
            jax.tree.leaves(got), jax.tree.leaves(want), strict=True
        ):
            assert_close(left, right, dtype="float32", length=50, name=implementation)


def temporaries(implementation, length, differentiate=True) -> int:
    x = jax.ShapeDtypeStruct((length, 1, 8), jnp.float32)

    def loss(q, k, v):
        y = attention(q, k, v, is_causal=True, implementation=implementation)
        return jnp.sum(y * y)

    function: Any = jax.grad(loss, (0, 1, 2)) if differentiate else loss
    memory: Any = jax.jit(function).lower(x, x, x).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
def test_memory_of_blocks_is_linear_in_the_length(monkeypatch, differentiate):
    monkeypatch.setattr(blockwise, "_BLOCK", (16, 16))
    short, long = (temporaries("blockwise", n, differentiate) for n in (512, 2048))
    assert long < 4.4 * short
    if differentiate:
        short, long = (temporaries("reference", n) for n in (512, 2048))
        assert long > 12 * short, "the test does not see what is quadratic"


@pytest.mark.parametrize(
    "outer", [pytest.param("forward", marks=pytest.mark.slow), "reverse"]
)
def test_hessian_memory_of_blocks_is_linear_too(monkeypatch, outer):
    monkeypatch.setattr(blockwise, "_BLOCK", (16, 16))

    def product(length):
        def loss(q, k, v):
            y = attention(q, k, v, is_causal=True, implementation="blockwise")
            return jnp.sum(y * y)

        x = jax.ShapeDtypeStruct((length, 1, 8), jnp.float32)
        slope = jax.grad(loss, (0, 1, 2))
        if outer == "forward":
            along = lambda q, k, v: jax.jvp(slope, (q, k, v), (k, v, q))[1]
        else:
            size = lambda *point: sum(jnp.sum(x * x) for x in slope(*point))
            along = jax.grad(size, (0, 1, 2))
        memory: Any = jax.jit(along).lower(x, x, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    sizes = [product(n) for n in (512, 2048)]
    assert sizes[1] < 4.4 * sizes[0], sizes


def weights_under_dropout(p, key, implementation="blockwise"):
    """The weights themselves: the values are the rows of the identity."""
    given = cast(arguments(Spec("weights", 1, 30, 20, 2, 2, 3, 1)), "float32")
    given["value"] = jnp.broadcast_to(jnp.eye(20)[:, None], (1, 20, 2, 20))
    run = functools.partial(attention, dropout_p=p, implementation=implementation)
    return quick_jit(run)(**given, dropout_key=key)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_dropout_drops_weights_and_scales_the_others_up(implementation):
    full = weights_under_dropout(0.0, None, implementation)
    kept = weights_under_dropout(0.25, jax.random.key(1), implementation)
    ratio = np.asarray(kept / full)
    dropped = np.isclose(ratio, 0)
    assert np.all(dropped | np.isclose(ratio, 1 / 0.75, rtol=1e-5))
    # 1200 draws: the share has a standard deviation of 0.0125.
    assert abs(dropped.mean() - 0.25) < 0.06
    # Every block draws anew: no two rows of 20 agree.
    rows = dropped.transpose(0, 2, 1, 3).reshape(-1, 20)
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert not np.any(weights_under_dropout(1.0, jax.random.key(1), implementation))


def test_the_gradient_drops_the_same_weights():
    given = cast(arguments(SMALL), "float32")
    how = {"dropout_p": 0.4, "dropout_key": jax.random.key(3)}

    def with_value(value):
        changed = given | {"value": value}
        return attention(**changed, **how, implementation="blockwise")

    slopes = jnp.cos(jnp.arange(5 * 2 * 3.0)).reshape(1, 5, 2, 3)
    pulled = lambda value: jax.vjp(with_value, value)[1](slopes)[0]
    got = quick_jit(pulled)(given["value"])
    eye = jnp.broadcast_to(jnp.eye(7)[:, None], (1, 7, 1, 7))
    weights = quick_jit(with_value)(eye)  # (1, 5, 2, 7)
    want = np.einsum("bqhk,bqhv->bkv", weights, slopes)[:, :, None]
    assert_close(got, want, dtype="float32", length=10)
    # And in the queries: a finite difference, the draws held fixed.
    loss = lambda q: jnp.sum(
        slopes
        * attention(q, given["key"], given["value"], **how, implementation="blockwise")
    )
    along = jnp.sin(given["query"])
    slope = jnp.vdot(quick_jit(jax.grad(loss))(given["query"]), along)
    h, run = 1e-2, quick_jit(loss)
    ends = [run(given["query"] + s * h * along) for s in (1, -1)]
    # Second order in h and float32's spacing over h.
    assert_close(slope, (ends[0] - ends[1]) / (2 * h), dtype="float32", length=10**5)


def test_the_default_is_blocks_where_scores_are_many(monkeypatch):
    from capibara_eqx.kernels._attention import api

    given = cast(arguments(TEST_SPECS[1]), "float32")
    text = lambda: str(
        jax.make_jaxpr(functools.partial(attention, is_causal=True))(**given)
    )
    assert "custom_jvp" not in text()
    monkeypatch.setattr(api, "_SCORES_AT_ONCE", 10)
    assert "custom_jvp" in text()
