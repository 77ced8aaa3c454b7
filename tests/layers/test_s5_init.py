"""How an S5 layer starts, its dropout, and that every argument counts."""

import functools
import inspect
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.quick import built, filled

from capibara_eqx.layers import S5, hippo_diagonal, hippo_matrices, weight_decay_mask


# The keys are fixed, so that a distribution test gives the same answer every time.
LEVEL = 1e-3
BLOCKS, STATES = 3, 16


@functools.cache
def wide_layer(C_init="lecun_normal"):
    """Enough numbers for statistics."""
    return built(S5, 40, BLOCKS * STATES, BLOCKS, C_init=C_init, key=jax.random.key(0))


def as_complex(pairs):
    pairs = np.asarray(pairs, "float64")
    return pairs[..., 0] + 1j * pairs[..., 1]


def looks_like(values, distribution):
    return stats.kstest(np.ravel(values), distribution.cdf).pvalue > LEVEL


# Of variance one.
TRUNCATED = stats.truncnorm(-2, 2, scale=1 / stats.truncnorm(-2, 2).std())


def test_blocks_are_the_normal_part_of_hippo():
    """The kept halves of all blocks, with their conjugates, are the real matrix."""
    eigenvalues = as_complex(wide_layer().eigenvalues)
    V = np.asarray(hippo_diagonal(STATES).V)
    P = np.sqrt(np.arange(STATES) + 0.5)
    normal = np.asarray(hippo_matrices(STATES).A) + np.outer(P, P)
    for block in eigenvalues.reshape(BLOCKS, STATES // 2):
        whole = 2 * np.real(V * block @ V.conj().T)
        np.testing.assert_allclose(whole, normal, atol=1e-5 * np.abs(normal).max())


def test_the_input_matrix_is_normal_before_the_change_of_basis():
    V = np.asarray(hippo_diagonal(STATES).V)
    blocks = as_complex(wide_layer().B).reshape(BLOCKS, STATES // 2, 40)
    B = 2 * np.real(V @ blocks) * math.sqrt(40)
    assert looks_like(B, TRUNCATED)
    # The test can tell a truncated distribution from one that is not.
    assert not looks_like(np.random.default_rng(0).standard_normal(9000), TRUNCATED)


@pytest.mark.parametrize(
    ("C_init", "variance"),
    # In the eigenbasis: each part is a sum over the states of a block.
    [
        ("lecun_normal", 1 / (BLOCKS * STATES)),
        ("truncated_normal", 1.0),
        ("complex_normal", 0.5),
    ],
)
def test_the_readout(C_init, variance):
    C = np.asarray(wide_layer(C_init).C, "float64")
    assert looks_like(C, stats.norm(scale=math.sqrt(variance)))
    assert abs(np.corrcoef(C[..., 0].ravel(), C[..., 1].ravel())[0, 1]) < 0.15


def test_step_sizes_and_feedthrough():
    layer = wide_layer()
    low, high = math.log(0.001), math.log(0.1)
    assert looks_like(layer.log_step, stats.uniform(low, high - low))
    assert looks_like(layer.D, stats.norm)
    assert looks_like(layer.gate.weight, stats.uniform(-(40**-0.5), 2 * 40**-0.5))


def test_what_decays_and_what_stays_wide():
    layer = filled(S5, 2, 4, seed=0, size=1.0, dtype=jnp.bfloat16)
    leaves = jax.tree.leaves_with_path(weight_decay_mask(layer))
    kept = {jax.tree_util.keystr(path) for path, decays in leaves if not decays}
    dynamics = {".eigenvalues", ".log_step", ".D"}
    assert kept - {".dropout.p", ".dropout.inference"} == dynamics | {".gate.bias"}
    for path, leaf in jax.tree.leaves_with_path(eqx.filter(layer, eqx.is_array)):
        is_wide = jax.tree_util.keystr(path) in dynamics
        assert leaf.dtype == (jnp.float32 if is_wide else jnp.bfloat16)


DEFAULTS: dict[str, Any] = {"d_model": 3, "d_state": 4, "dt_min": 0.2, "dt_max": 0.5}
OTHERS: dict[str, Any] = {
    "d_model": 2,
    "d_state": 2,
    "blocks": 2,
    "discretization": "bilinear",
    "dt_min": 0.4,
    "dt_max": 2.0,
    "C_init": "complex_normal",
    "dropout_rate": 0.5,
    "dtype": jnp.bfloat16,
    "implementation": "reference",
    "clip_eigenvalues": True,
    "key": jax.random.key(1),
}


def shapes(arguments):
    layer = eqx.filter_eval_shape(S5, **arguments)
    arrays = [leaf for leaf in jax.tree.leaves(layer) if hasattr(leaf, "shape")]
    return [(leaf.shape, leaf.dtype) for leaf in arrays]


@eqx.filter_jit
def outputs(arguments):
    """What the layer makes of one input, some of its eigenvalues being positive."""
    layer = S5(**arguments)
    layer = eqx.tree_at(lambda m: m.eigenvalues, layer, replace_fn=lambda z: z + 0.6)
    x = jnp.sin(jnp.arange(21.0)).reshape(7, 3)
    return layer(x, key=jax.random.key(3))


def test_every_argument_is_tested():
    assert sorted(inspect.signature(S5).parameters) == sorted(OTHERS)


@pytest.fixture(scope="module")
def default_outputs():
    return outputs({**DEFAULTS, "key": jax.random.key(0)})


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "implementation"])
def test_every_argument_changes_the_layer(name, default_outputs):
    default = {**DEFAULTS, "key": jax.random.key(0)}
    arguments = default | {name: OTHERS[name]}
    if shapes(arguments) == shapes(default):
        assert np.any(np.abs(outputs(arguments) - default_outputs) > 1e-6)


def test_the_implementation_reaches_the_recurrence():
    def program(implementation):
        layer = filled(S5, 2, 4, seed=0, size=1.0, implementation=implementation)
        return str(jax.make_jaxpr(layer)(jnp.zeros((1, 7, 2))))

    assert program("xla") != program("reference")


def test_dropout_drops_what_is_gated():
    layer = filled(S5, 4, 2, seed=2, size=0.5, dropout_rate=0.25)
    layer = eqx.tree_at(lambda m: m.eigenvalues, layer, jnp.array([[-1.0, 2.0]]))
    x = np.random.default_rng(0).standard_normal((50, 4)).astype("float32")

    @eqx.filter_jit
    def run(layer, x, key):
        quiet = eqx.nn.inference_mode(layer)
        return layer(x, key=key), quiet(x), layer.prefill(x, layer.init_cache())[0]

    y, want, read = run(layer, x, jax.random.key(4))
    np.testing.assert_array_equal(read, want)
    dropped = np.asarray(y) == 0
    assert stats.binomtest(int(dropped.sum()), dropped.size, 0.25).pvalue > LEVEL
    assert not np.any(np.asarray(want) == 0)
