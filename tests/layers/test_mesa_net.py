"""MesaNet's values and derivatives, against weighted ridge regressions in float64."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from support.derivatives import check_first_order, check_second_order
from support.fast_weight_maml import check_maml
from support.layer_cases import packed_rows, seeds
from support.mesa_oracle import (
    Sums,
    mesa_packed,
    mesa_row,
    parameters,
    regressed,
    settings,
    with_parameters,
)
from support.model_oracle import moved
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.layers import MesaNet
from capibara_eqx.layers._conjugate_gradient import conjugate_gradient
from capibara_eqx.layers._mesa import MesaState, mesa


# Fewer chunks than tokens, one token, and a convolution longer than the row.
CONFIGS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "default": (6, 2, 7, {}),
    "exact": (6, 2, 7, {"solver": "cholesky", "chunk_size": 3}),
    "chunks": (3, 1, 9, {"gate": True, "chunk_size": 4, "implementation": "xla"}),
    "one_token": (4, 2, 1, {"d_conv": 2, "cg_steps": 6}),
    "short": (4, 1, 2, {"d_conv": 6, "ridge_min": 0.05}),
    # What is read may nearly vanish, of one token most of all, where its query and key
    # are orthogonal: a norm of size one would make its rounding as many times larger.
    "steady": (6, 2, 7, {"norm_eps": 0.5}),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def make(name):
    d_model, n_heads, _, options = CONFIGS[name]
    return moved(MesaNet(d_model, n_heads, **options, key=jax.random.key(0)), 0)


def point_of(layer, seed, seq):
    """Parameters, input and caches of order one, as NumPy float64 arrays."""
    rng, d = np.random.default_rng(seed), layer.head_dim
    roots = rng.standard_normal((layer.n_heads, d, d))
    return {
        name: value.astype("float64") for name, value in parameters(layer).items()
    } | {
        "x": rng.standard_normal((seq, layer.d_model)),
        "inputs": rng.standard_normal((layer.conv.reach, 2 * layer.d_model)),
        "root": roots,
        "G": rng.standard_normal((layer.n_heads, d, d)),
    }


def read(layer, point):
    """Outputs and new cache at a point, from the layer."""
    H = point["root"] @ jnp.swapaxes(point["root"], -1, -2)
    cache = eqx.tree_at(
        lambda c: (c.conv.inputs, c.sums),
        layer.init_cache(),
        (point["inputs"], MesaState(H, point["G"])),
    )
    return with_parameters(layer, point).prefill(point["x"], cache)


def read_by_loops(layer, point):
    H = point["root"] @ np.swapaxes(point["root"], -1, -2)
    before = Sums(point["inputs"], H, point["G"])
    return mesa_row(point, point["x"], settings(layer), before)


def losses(layer, seq):
    """One loss twice: on the layer, and on the loops."""
    rng, point = np.random.default_rng(7), point_of(layer, 0, seq)
    y, after = read_by_loops(layer, point)
    weights = [rng.standard_normal(part.shape) for part in (y, *after)]

    def loss(point):
        y, cache = read(layer, point)
        parts = (y, cache.conv.inputs, cache.sums.H, cache.sums.G)
        terms = [jnp.sum(w * p**2) for w, p in zip(weights, parts, strict=True)]
        return jnp.sum(jnp.stack(terms))

    def oracle(point):
        y, after = read_by_loops(layer, point)
        parts = (y, *after)
        return sum(np.sum(w * p**2) for w, p in zip(weights, parts, strict=True))

    return loss, oracle


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("default", "float64"),
        *(slow("default", "float32"), slow("exact", "float32")),
        *(slow(name, "float64") for name in CONFIGS if name != "default"),
    ],
)
def test_values_and_caches_are_those_of_the_regressions(name, dtype):
    seq = CONFIGS[name][2]
    with enable_x64(dtype == "float64"):
        layer = make(name)
        cast = {n: jnp.asarray(v, dtype) for n, v in point_of(layer, 1, seq).items()}
        y, cache = jax.jit(lambda point: read(layer, point))(cast)
        assert {y.dtype, cache.sums.H.dtype} == {jnp.dtype(dtype)}
        rounded = {n: np.asarray(v, "float64") for n, v in cast.items()}
        want, after = read_by_loops(layer, rounded)
        close = functools.partial(assert_close, dtype=dtype, length=100)
        close(y, want, name="y")
        close(cache.sums.H, after.H, name="H")
        close(cache.sums.G, after.G, name="G")
        close(cache.conv.inputs, after.inputs, name="inputs of the convolution")


@functools.cache
def compiled_call():
    return eqx.filter_jit(lambda layer, x, ids: layer(x, segment_ids=ids))


@given(rows=packed_rows, seed=seeds)
@example(rows=[0, -1, -1, -1, -1, 3], seed=1766)
def test_packed_rows_are_those_of_the_regressions(rows, seed):
    layer = make("steady")
    x = np.random.default_rng(seed).standard_normal((len(rows), 6)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled_call()(layer, x, ids)
    want = mesa_packed(parameters(layer), x, settings(layer), ids)
    assert_close(y, want, dtype="float32", length=100)


def inner(seed, seq=4, width=4):
    """Queries, keys and values of one head, decays and weights."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, seq, 1, width))
    return q, k, v, rng.uniform(0.5, 1, (seq, 1)), rng.uniform(0.2, 1, (seq, 1))


def fresh(width):
    return MesaState(jnp.zeros((1, width, width)), jnp.zeros((1, width, width)))


@functools.partial(jax.jit, static_argnames=("solver", "cg_steps"))
def read_out(q, k, v, gamma, beta, ridge, solver, cg_steps):
    state, how = fresh(q.shape[-1]), {"solver": solver, "cg_steps": cg_steps}
    return mesa(q, k, v, jnp.log(gamma), beta, ridge, state, **how)[0]


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_as_many_steps_as_channels_are_exact(solver):
    with enable_x64():
        parts, ridge = inner(1), np.array([[0.3, 1.0, 2.0, 0.5]])
        got = read_out(*parts, ridge, solver=solver, cg_steps=4)
        q, k, v, gamma, beta = (part[:, 0] for part in parts)
        zeros = np.zeros((4, 4))
        want, _, _ = regressed(q, k, v, gamma, beta, ridge[0], zeros, zeros)
        assert_close(got[:, 0], want, dtype="float64", length=100)


def test_without_a_ridge_a_key_that_was_seen_gives_its_value():
    with enable_x64():
        _, k, v, _, _ = inner(2)
        ones, ridge = np.ones((4, 1)), np.full((1, 4), 1e-9)
        for seen in range(4):
            q = np.broadcast_to(k[seen], k.shape)
            got = read_out(q, k, v, ones, ones, ridge, solver="cholesky", cg_steps=4)
            wants = np.broadcast_to(v[seen], (4 - seen, 1, 4))
            np.testing.assert_allclose(got[seen:], wants, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_map_of_the_whole_prefix_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    with enable_x64():
        q, k, v, _, beta = inner(3)
        ones, ridge = np.ones((4, 1)), np.full((1, 4), 0.7)
        got = read_out(q, k, v, ones, beta, ridge, solver="cg", cg_steps=4)
        model = linear_model.Ridge(alpha=0.7, fit_intercept=False, solver="cholesky")
        model.fit(k[:, 0], v[:, 0], sample_weight=beta[:, 0])
        want = model.predict(q[-1])
        assert_close(got[-1], want, dtype="float64", length=100)


def test_solved_systems_stay_solved_and_zeros_stay_zeros():
    """More steps than channels, where every number of a step is a rounding error."""
    matrix = jnp.asarray([[3.0, 1.0], [1.0, 2.0]])
    b = jnp.asarray([[1.0, -2.0], [0.0, 0.0], [1e-30, 0.0]])

    def solved(matrix, b):
        return conjugate_gradient(lambda p: p @ matrix, b, 40)

    x = jax.jit(solved)(matrix, b)
    assert_close(x[0], np.linalg.solve(matrix, b[0]), dtype="float32", length=4)
    assert not np.any(x[1])
    slopes = jax.jit(jax.jacrev(solved, (0, 1)))(matrix, b)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    want = np.linalg.inv(matrix)
    assert_close(slopes[1][0, :, 0], want, dtype="float32", length=4)
    assert_close(slopes[1][1, :, 1], want, dtype="float32", length=4)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_first_derivatives_through_caches(solver):
    options: dict[str, Any] = {"solver": solver, "chunk_size": 2, "norm_eps": 0.5}
    layer = MesaNet(2, 1, d_conv=2, **options, key=jax.random.key(2))
    layer = moved(layer, 2)
    check_first_order(*losses(layer, 3), point_of(layer, 3, 3))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_second_derivatives_through_caches(solver, implementation):
    options = {"solver": solver, "implementation": implementation, "norm_eps": 0.5}
    layer = MesaNet(2, 1, d_conv=2, chunk_size=2, **options, key=jax.random.key(2))
    layer = moved(layer, 2)
    check_second_order(*losses(layer, 3), point_of(layer, 3, 3))


@pytest.mark.slow
def test_maml_through_the_layer():
    layer = MesaNet(2, 1, d_conv=2, norm_eps=0.5, key=jax.random.key(3))
    layer = moved(layer, 3)
    known = settings(layer)
    check_maml(
        lambda params, x: with_parameters(layer, params)(x),
        lambda params, x: mesa_row(params, x, known)[0],
        {name: v.astype("float64") for name, v in parameters(layer).items()},
        d_model=2,
    )


@pytest.mark.slow
def test_no_token_has_a_matrix_of_its_own():
    """Of conjugate gradients; the exact solver makes one."""
    seq, d = 40, 7

    def shapes(solver):
        options = {"solver": solver, "chunk_size": 8, "implementation": "xla"}
        layer = MesaNet(d, 1, **options, key=jax.random.key(0))
        program = jax.jit(layer.__call__).lower(jnp.zeros((seq, d)))
        return program.as_text()

    assert f"{seq}x1x{d}x{d}" not in shapes("cg")
    assert f"{seq}x1x{d}x{d}" in shapes("cholesky")
