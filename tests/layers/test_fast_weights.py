"""DeltaNet and Meta Linear Attention: values and derivatives, against NumPy loops."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support import fast_weight_oracle as oracle
from support.derivatives import check_first_order, check_second_order
from support.layer_cases import packed_rows, seeds
from support.mamba_oracle import Remembered
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import DeltaNet, MetaLinearAttention
from capibara_eqx.models import ResidualBlock, Stack


GATED: dict[str, Any] = {"gated": True, "output_gate": True, "conv_bias": True}
# constructor, width, heads, tokens, options; the rows are longer than a chunk, or
# shorter than the convolution.
CONFIGS: dict[str, tuple[Any, int, int, int, dict[str, Any]]] = {
    "delta": (DeltaNet, 4, 2, 7, {"chunk_size": 3}),
    "delta_gated": (DeltaNet, 3, 2, 7, {**GATED, "head_dim": 3, "v_head_dim": 2}),
    "delta_decayed": (DeltaNet, 3, 1, 7, {"gated": True, "norm_eps": 0.1}),
    "delta_negative": (
        DeltaNet,
        *(4, 1, 7),
        {"negative_eigenvalues": True, "use_short_conv": False, "head_dim": 3},
    ),
    "delta_long": (DeltaNet, 2, 1, 71, {**GATED, "chunk_size": 16}),
    "delta_short": (DeltaNet, 2, 1, 2, {"d_conv": 6, "chunk_size": 1}),
    "meta": (MetaLinearAttention, 4, 2, 7, {"chunk_size": 3}),
    "meta_wide": (
        MetaLinearAttention,
        *(3, 2, 7),
        {"head_dim": 3, "v_head_dim": 5, "temperature": 2.0, "norm_eps": 0.1},
    ),
    "meta_long": (MetaLinearAttention, 2, 1, 40, {"temperature": 1.0}),
    "meta_short": (MetaLinearAttention, 2, 1, 2, {"d_conv": 6}),
}
QUICK = [("delta", "float64"), ("delta_gated", "float64"), ("meta", "float64")]
ROWS = {DeltaNet: oracle.delta_net_row, MetaLinearAttention: oracle.meta_linear_row}


@functools.cache
def make(name, **others):
    layer, d_model, n_heads, _, options = CONFIGS[name]
    return filled(layer, d_model, n_heads, **options | others, seed=0, size=0.7)


def point_of(layer, seed, seq):
    """Parameters, input and caches of order one, as NumPy float64 arrays."""
    rng = np.random.default_rng(seed)
    cache = layer.init_cache()
    point = {
        name: value.astype("float64")
        for name, value in oracle.parameters(layer).items()
    } | {
        "x": rng.standard_normal((seq, layer.d_model)),
        "state": rng.standard_normal(cache.state.shape),
    }
    if "conv_bias" in point:
        # Keys of order one: the derivatives of their directions are, too.
        point["conv_bias"] = point["conv_bias"] + 2.0
    if cache.conv is not None:
        point["inputs"] = rng.standard_normal(cache.conv.inputs.shape)
    return point


def read(layer, point):
    """Outputs and new cache at a point, from the layer."""
    cache = eqx.tree_at(lambda c: c.state, layer.init_cache(), point["state"])
    if cache.conv is not None:
        cache = eqx.tree_at(lambda c: c.conv.inputs, cache, point["inputs"])
    y, cache = oracle.with_parameters(layer, point).prefill(point["x"], cache)
    return (y, cache.state, *(() if cache.conv is None else (cache.conv.inputs,)))


def read_by_loop(layer, point):
    before = Remembered(point.get("inputs"), point["state"])
    row = ROWS[type(layer)]
    y, after = row(point, point["x"], oracle.settings(layer), before)
    return (y, after.state, *((after.inputs,) if "inputs" in point else ()))


def losses(layer, seq):
    """One loss twice: on the layer, and on the loops."""
    rng, point = np.random.default_rng(7), point_of(layer, 0, seq)
    names = [name for name in ("x", "state", "inputs") if name in point]
    weights = [rng.standard_normal(point[name].shape) for name in names]

    def loss(point):
        parts = zip(weights, read(layer, point), strict=True)
        return jnp.sum(jnp.stack([jnp.sum(w * part**2) for w, part in parts]))

    def by_loop(point):
        parts = zip(weights, read_by_loop(layer, point), strict=True)
        return sum(np.sum(w * part**2) for w, part in parts)

    return loss, by_loop


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *(name, dtype),
            marks=() if (name, dtype) in QUICK else pytest.mark.slow,
        )
        for name in CONFIGS
        for dtype in ("float32", "float64")
    ],
)
def test_values_and_caches_are_those_of_the_loops(name, dtype):
    seq = CONFIGS[name][3]
    with enable_x64(dtype == "float64"):
        layer = make(name)
        cast = {n: jnp.asarray(v, dtype) for n, v in point_of(layer, 1, seq).items()}
        got = jax.jit(lambda point: read(layer, point))(cast)
        assert {part.dtype for part in got} == {jnp.dtype(dtype)}
        rounded = {n: np.asarray(v, "float64") for n, v in cast.items()}
        want = read_by_loop(layer, rounded)
        for part, wanted in zip(got, want, strict=True):
            assert_close(part, wanted, dtype=dtype, length=20 * seq)


@pytest.mark.parametrize("name", ["delta_gated", "meta"])
def test_one_token_is_the_recurrence_and_no_chunk(name):
    layer = make(name)
    step = jax.make_jaxpr(layer.step)
    program = str(step(jnp.zeros(layer.d_model), layer.init_cache()))
    for word in ("while", "scan", "triangular_solve"):
        assert word not in program


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta", "delta_gated", "delta_negative", "meta"])
@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loops(name, rows, seed):
    # A norm would fill the rounding of an output that is almost zero.
    layer = make(name, norm_eps=0.5)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(rows), layer.d_model)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    row, known = ROWS[type(layer)], oracle.settings(layer)
    want = oracle.packed(row, oracle.parameters(layer), x, known, ids)
    assert_close(y, want, dtype="float32", length=100, terms=0.1)


SMALL: dict[str, Any] = {"norm_eps": 0.5, "d_conv": 2, "chunk_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_gated", "delta_negative", "meta_wide"])
def test_first_derivatives_through_caches(name):
    layer = make(name, **SMALL)
    check_first_order(*losses(layer, 5), point_of(layer, 2, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("delta_gated", {"head_dim": 2, "v_head_dim": 1}),
        ("meta_wide", {"head_dim": 1, "v_head_dim": 2}),
    ],
)
def test_second_derivatives_through_caches(name, options):
    layer = make(name, **SMALL, **options)
    check_second_order(*losses(layer, 4), point_of(layer, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta", "meta"])
def test_a_batch_may_have_no_rows(name):
    layer, x = make(name), jnp.zeros((2, 0, 7, 4))
    for ids in (None, jnp.zeros(x.shape[:-1], "int32")):
        cache = layer.init_cache(x.shape[:-2])
        y, after = eqx.filter_jit(layer.prefill)(x, cache, segment_ids=ids)
        assert y.shape == x.shape
        assert eqx.tree_equal(after, cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_gated", "meta"])
def test_a_scanned_stack_is_a_list(name):
    layer, d_model, n_heads, _, options = CONFIGS[name]
    keys = jax.random.split(jax.random.key(1), 2)
    blocks = [
        ResidualBlock(layer(d_model, n_heads, **options, key=key), d_model)
        for key in keys
    ]
    x = np.random.default_rng(4).standard_normal((2, 7, d_model)).astype("float32")
    ids = jnp.asarray([[0, 0, 1, 1, 1, -1, 2]] * 2)
    stacks = [Stack(blocks, scan=scan) for scan in (True, False)]
    run = eqx.filter_jit(lambda stack, x, ids: stack(x, segment_ids=ids)[0])
    scanned, listed = (run(stack, jnp.asarray(x), ids) for stack in stacks)
    assert_close(scanned, listed, dtype="float32", length=100)


@pytest.mark.slow
def test_a_memory_that_only_adds_cannot_unlearn():
    """Negative eigenvalues: the parity of a row of ones, which no decay can tell."""
    layer = make("delta_negative")
    # One key, a rate of two: the memory changes its sign with every token.
    layer = eqx.tree_at(
        lambda m: (m.k_proj.weight, m.q_proj.weight, m.v_proj.weight),
        layer,
        replace_fn=lambda w: jnp.zeros_like(w).at[:, 0].set(1.0),
    )
    weight = jnp.zeros_like(layer.beta_proj.weight).at[:, 0].set(30.0)
    layer = eqx.tree_at(lambda m: m.beta_proj.weight, layer, weight)
    layer = eqx.tree_at(lambda m: m.v_proj.weight, layer, replace_fn=jnp.zeros_like)
    cache = layer.init_cache()
    cache = eqx.tree_at(lambda c: c.state, cache, jnp.ones_like(cache.state))
    ones = jnp.zeros((6, 4)).at[:, 0].set(1.0)
    y, _ = layer.prefill(ones, cache)
    signs = np.sign(np.asarray(y)[:, 0] * np.asarray(y)[0, 0])
    np.testing.assert_array_equal(signs, [1, -1, 1, -1, 1, -1])
