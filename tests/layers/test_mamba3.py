"""The Mamba-3 layer's values and derivatives, against a NumPy loop in float64."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support.derivatives import check_first_order, check_second_order
from support.layer_cases import packed_rows, seeds
from support.mamba3_oracle import (
    Remembered,
    mamba3_packed,
    mamba3_row,
    parameters,
    settings,
    with_parameters,
)
from support.model_oracle import moved
from support.precision import enable_x64
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.layers import Mamba3


# Steps of order one: the state, the turns and both points of the rule count.
STEPS: dict[str, Any] = {"dt_min": 0.3, "dt_max": 1.0}
CONFIGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "default": (3, 7, {"d_state": 4, "head_dim": 2}),
    # Two pairs turn, and one column is left.
    "groups": (
        4,
        7,
        {"d_state": 5, "head_dim": 2, "n_groups": 2, "rope_fraction": 1.0},
    ),
    # The floor is met by some tokens and not by others.
    "norm": (
        2,
        7,
        {"d_state": 7, "head_dim": 2, "output_norm": True}
        | {"A_floor": 0.7, "norm_eps": 1e-2},
    ),
    "narrow": (
        2,
        7,
        {"d_state": 2, "head_dim": 1, "n_groups": 2, "rope_fraction": 1.0}
        | {"expand": 1, "output_norm": True},
    ),
    "long": (
        2,
        71,
        {"d_state": 4, "head_dim": 2, "chunk_size": 16, "implementation": "xla"},
    ),
}


@functools.cache
def make(name, **others):
    d_model, _, options = CONFIGS[name]
    options = {**STEPS, **options, **others}
    return moved(Mamba3(d_model, **options, key=jax.random.key(0)), 0)


def point_of(layer, seed, seq):
    """Parameters, input and caches of order one, as NumPy float64 arrays."""
    rng = np.random.default_rng(seed)
    cache = layer.init_cache()
    shapes = {
        "x": (seq, layer.d_model),
        "state": cache.state.shape,
        "angle": (layer.n_heads, layer.angles),
        "B": cache.last.B.shape,
        "u": cache.last.u.shape,
        "weight": cache.last.weight.shape,
    }
    known = {name: v.astype("float64") for name, v in parameters(layer).items()}
    return known | {name: rng.standard_normal(s) for name, s in shapes.items()}


def with_last_token(state, B, u, weight):
    """The state of the formula: a cache holds it without the last token's own term."""
    return state + weight[:, None, None] * u[:, :, None] * B[:, None, :]


def read(layer, point):
    """What the layer gives at a point: outputs, and the cache as the formula has it."""
    cache = eqx.tree_at(
        lambda c: (c.state, c.turn, c.last.B, c.last.u, c.last.weight),
        layer.init_cache(),
        (
            point["state"],
            jnp.stack([jnp.cos(point["angle"]), jnp.sin(point["angle"])], axis=-1),
            *(point[name] for name in ("B", "u", "weight")),
        ),
    )
    y, cache = with_parameters(layer, point).prefill(point["x"], cache)
    return {"y": y, **as_remembered(cache)}


def as_remembered(cache):
    last = cache.last
    state = with_last_token(cache.state, last.B, last.u, last.weight)
    return {"state": state, "turn": cache.turn, "B": last.B, "u": last.u}


def read_by_loop(layer, point):
    """What `read` gives, by the loop."""
    names = ("state", "B", "u", "weight")
    state = with_last_token(*(point[name] for name in names))
    before = Remembered(state, point["angle"], point["B"], point["u"])
    y, after = mamba3_row(point, point["x"], settings(layer), before)
    return {"y": y, **by_loop(after)}


def by_loop(after):
    turn = np.stack([np.cos(after.angle), np.sin(after.angle)], axis=-1)
    return {"state": after.state, "turn": turn, "B": after.B, "u": after.u}


def close(layer, got, want, seq, dtype="float32"):
    terms = seq * layer.d_state + layer.d_inner
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert_close(got[name], values, dtype=dtype, length=terms, name=name)


def losses(layer, seq):
    """One loss twice: on the layer, and on the loop."""
    rng = np.random.default_rng(7)
    sample = read_by_loop(layer, point_of(layer, 0, seq))
    weights = {name: rng.standard_normal(v.shape) for name, v in sample.items()}

    def loss(point):
        parts = read(layer, point)
        terms = [jnp.sum(weights[name] * p**2) for name, p in parts.items()]
        return jnp.sum(jnp.stack(terms))

    def oracle(point):
        parts = read_by_loop(layer, point)
        return sum(np.sum(weights[name] * p**2) for name, p in parts.items())

    return loss, oracle


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_caches_are_those_of_the_loop(name, dtype):
    seq = CONFIGS[name][1]
    with enable_x64(dtype == "float64"):
        layer = make(name)
        cast = {n: jnp.asarray(v, dtype) for n, v in point_of(layer, 1, seq).items()}
        got = jax.jit(lambda point: read(layer, point))(cast)
        assert {part.dtype for part in got.values()} == {jnp.dtype(dtype)}
        rounded = {n: np.asarray(v, "float64") for n, v in cast.items()}
        close(layer, got, read_by_loop(layer, rounded), seq, dtype)


def test_the_floor_is_met_by_some_tokens_and_not_by_others():
    """In the case above, which would say little about the floor otherwise."""
    layer, point = make("norm"), point_of(make("norm"), 1, 7)
    known = settings(layer)
    floors = (known.A_floor, 1e-4, 100.0)
    floored, free, all_alike = (
        mamba3_row(point, point["x"], known._replace(A_floor=floor))[0]
        for floor in floors
    )
    assert np.max(np.abs(floored - free)) > 1e-3
    assert np.max(np.abs(floored - all_alike)) > 1e-3


@functools.cache
def compiled(function):
    return eqx.filter_jit(function)


def call(layer, x, ids=None):
    return layer(x, segment_ids=ids)


def prefill(layer, x, cache, ids=None):
    return layer.prefill(x, cache, segment_ids=ids)


def step(layer, x, cache):
    return layer.step(x, cache)


@pytest.mark.parametrize("name", ["groups", "norm"])
def test_a_loop_of_steps_is_the_loop(name):
    layer, (d_model, seq, _) = make(name), CONFIGS[name]
    x = np.random.default_rng(3).standard_normal((seq, d_model)).astype("float32")
    want, after = mamba3_row(parameters(layer), x, settings(layer))
    cache, outputs = layer.init_cache(), []
    for token in x:
        y, cache = compiled(step)(layer, token, cache)
        outputs.append(y)
    got = {"y": np.stack(outputs), **as_remembered(cache)}
    close(layer, got, {"y": want, **by_loop(after)}, seq)


def test_one_token_is_the_recurrence_and_no_chunk():
    layer = Mamba3(8, 4, head_dim=4, chunk_size=64, key=jax.random.key(0))
    program = jax.make_jaxpr(layer.step)(jnp.zeros(8), layer.init_cache())
    shapes = [v.aval.shape for e in program.eqns for v in e.outvars]
    assert all(64 not in shape for shape in shapes)


@given(rows=packed_rows, seed=seeds)
def test_packed_rows_are_those_of_the_loop(rows, seed):
    layer = make("groups")
    x = np.random.default_rng(seed).standard_normal((len(rows), 4)).astype("float32")
    ids = np.asarray(rows, "int32")
    y = compiled(call)(layer, x, ids)
    want = mamba3_packed(parameters(layer), x, settings(layer), ids)
    assert_close(y, want, dtype="float32", length=100)


def test_first_derivatives_through_caches():
    options = {"d_state": 5, "head_dim": 2, "output_norm": True, "norm_eps": 0.1}
    options |= {"chunk_size": 3, "implementation": "xla"}
    layer = moved(Mamba3(2, **STEPS, **options, key=jax.random.key(1)), 1)
    check_first_order(*losses(layer, 5), point_of(layer, 2, 5))


@pytest.mark.slow
def test_second_derivatives_through_caches():
    options = {"d_state": 3, "head_dim": 1, "rope_fraction": 1.0, "norm_eps": 0.5}
    options |= {"chunk_size": 3, "implementation": "xla"}
    layer = moved(Mamba3(1, **STEPS, **options, key=jax.random.key(2)), 2)
    check_second_order(*losses(layer, 4), point_of(layer, 3, 4))


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_an_overflow_stays_in_its_document(implementation):
    # All tokens are in one chunk.
    layer = make("default", implementation=implementation)
    rng = np.random.default_rng(6)
    x = rng.standard_normal((9, 3)).astype("float32")
    spoiled = x.copy()
    spoiled[3, 0] = np.inf
    ids = np.asarray([0, 0, 1, 1, 1, 2, 2, -1, 2], "int32")
    want, want_cache = compiled(prefill)(layer, x, layer.init_cache(), ids)
    y, cache = compiled(prefill)(layer, spoiled, layer.init_cache(), ids)
    assert not np.any(np.isfinite(y[3:5]))
    others = np.asarray([0, 1, 2, 5, 6, 7, 8])
    # Sums over the chunk round otherwise.
    got = {"y": y[others], **as_remembered(cache)}
    close(layer, got, {"y": want[others], **as_remembered(want_cache)}, 9)


# Not of XLA's products over a chunk, which pass infinity times zero on.
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_an_overflow_does_not_reach_back(implementation):
    layer = make("default", implementation=implementation)
    x = np.random.default_rng(7).standard_normal((9, 3)).astype("float32")
    spoiled = x.copy()
    spoiled[5, 0] = np.inf
    want, y = (compiled(call)(layer, tokens) for tokens in (x, spoiled))
    np.testing.assert_array_equal(y[:5], want[:5])
    assert not np.any(np.isfinite(y[5:]))


def counter(step_size, dtype=None):
    """Turns by pi times the step at a one, and remembers the first token for ever.

    Tokens are one-hot: start, zero, one. The readout of the first head is the cosine
    of the angle since the start, that of the second its sine, times twice the step.
    """
    layer = Mamba3(
        4,
        **{"d_state": 2, "expand": 1, "head_dim": 2, "rope_fraction": 1.0},
        A_floor=1e-9,
        dtype=dtype,
        key=jax.random.key(0),
    )
    z, u, maps, heads = np.ones((4, 4)), np.zeros((4, 4)), np.zeros((4, 4)), (2, 4)
    u[[0, 2], 0] = 1.0  # the start alone is taken in
    mixes, alpha = np.zeros(heads), np.full(heads, -100.0)  # halves; no decay
    theta = np.asarray([[0.0, 0.0, 20.0, 0.0]])  # the hyperbolic tangent is one
    weight = np.concatenate([z, u, maps, np.zeros(heads), alpha, mixes, theta])
    values = {
        "in_proj.weight": weight,
        "out_proj.weight": np.eye(4),
        "dt_bias": np.full(2, np.log(np.expm1(step_size))),
        "C_bias": np.asarray([[1.0, 1.0], [1.0, -1.0]]),
        "D": np.zeros(2),
    }
    own = parameters(layer)
    return with_parameters(
        layer, {n: jnp.asarray(v, own[n].dtype) for n, v in values.items()}
    )


def counted(bits):
    """A start and bits, as tokens."""
    return np.eye(4, dtype="float32")[[0, *(1 + bits)]]


@pytest.mark.parametrize("modulus", [2, 3, 5])
def test_it_counts_modulo(modulus):
    """What decays between zero and one cannot: parity of 64 bits, and more."""
    bits = np.random.default_rng(modulus).integers(0, 2, 64)
    layer = counter(2 / modulus)
    y = np.asarray(compiled(call)(layer, counted(bits)), "float64")[1:]
    gate = 1 / (1 + np.exp(-1.0))
    readout = (y[:, 0] + 1j * y[:, 2]) * modulus / (4 * gate)
    count = np.cumsum(bits)
    np.testing.assert_array_equal(
        np.rint(np.angle(readout) * modulus / (2 * np.pi)) % modulus, count % modulus
    )
    # Pi, the step, its softplus and the product: four roundings of an angle, and one
    # of each cosine and product.
    angle = 2 * np.pi / modulus * count
    allowed = EPSILONS["float32"] * (4 * angle + 2 * count + 8)
    assert np.all(np.abs(readout - np.exp(1j * angle)) <= allowed)


def test_narrow_inputs_leave_the_state_as_it_is():
    """The numbers of this layer are exact in bfloat16, those of its states are not."""
    bits = np.random.default_rng(0).integers(0, 2, 64)
    caches = []
    for dtype in ("float32", "bfloat16"):
        layer = counter(2 / 3, dtype)
        x = jnp.asarray(counted(bits), dtype)
        y, cache = compiled(prefill)(layer, x, layer.init_cache())
        assert y.dtype == dtype
        caches.append(cache)
    assert eqx.tree_equal(*caches)
    turn = np.asarray(caches[0].turn)
    assert np.any(turn != np.asarray(jnp.asarray(turn, "bfloat16"), "float32"))


def test_turns_lose_no_digits_as_they_grow():
    layer = counter(33.0)
    tokens = counted(np.ones(2000, int))
    _, cache = compiled(prefill)(layer, tokens, layer.init_cache())
    # At 33 the softplus is its input in float32, and the angle of a token this number.
    angle = 2000 * float(np.float32(np.pi) * np.float32(33))
    want = np.stack([np.cos(angle), np.sin(angle)])
    # Cosine, sine and the product of complex numbers, all off to the same side.
    allowed = 2000 * 3 * EPSILONS["float32"]
    assert np.max(np.abs(np.asarray(cache.turn, "float64") - want)) <= allowed
    # A sum of the angles would be off by more.
    assert np.spacing(np.float32(angle)) > 10 * allowed


def test_a_stream_that_repeats_neither_grows_nor_shrinks():
    """Without a norm a turn of 2000 equal tokens is off by hundreds of roundings."""
    layer = make("default")
    x = jnp.asarray(np.random.default_rng(1).standard_normal(3), "float32")

    def stream(layer):
        def one(cache, _):
            return layer.step(x, cache)[1], None

        return jax.lax.scan(one, layer.init_cache(), length=2000)[0].turn

    turn = np.asarray(compiled(stream)(layer), "float64")
    assert_close(np.sum(turn**2, -1), np.ones(turn.shape[:-1]), dtype="float32")
