"""Experts of two matrices, and what gathers them, against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import expert_oracle
from support.derivatives import check_first_order, check_second_order, quick_jit
from support.tolerances import assert_close

from capibara_eqx.kernels import experts


IMPLEMENTATIONS = ("ragged", "dense", "scan", "gather", "reference", "capacity")
# The others differ from what they are with a gate by one product less.
DERIVATIVES = [
    name if name == "gather" else pytest.param(name, marks=pytest.mark.slow)
    for name in IMPLEMENTATIONS
]


def arguments(tokens, count, top_k, d_model=3, d_ff=2, biases=True, seed=0):
    """Float64 arrays by name, and choices that may repeat, some of which are none."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (tokens, d_model),
        "weights": (tokens, top_k),
        "gate": (count, d_ff, d_model),
        "down": (count, d_model, d_ff),
    }
    if biases:
        shapes |= {"gate_bias": (count, d_ff), "down_bias": (count, d_model)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return arrays, rng.integers(-1, count + 1, (tokens, top_k)).astype("int32")


def run(arrays, indices, implementation, activation="gelu", factor=None):
    if implementation == "capacity" and factor is None:
        # Places for all the choices of a token, were they of one expert.
        factor = float(arrays["gate"].shape[0])
    return experts(
        **arrays,
        indices=jnp.asarray(indices),
        up=None,
        activation=activation,
        capacity_factor=factor,
        implementation=implementation,
    )


@functools.cache
def compiled(implementation, **options):
    return quick_jit(functools.partial(run, implementation=implementation, **options))


def narrow(arrays, dtype="float32"):
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("biases", [True, False])
def test_values(biases, implementation):
    arrays, indices = arguments(13, 5, 3, biases=biases)
    single = narrow(arrays)
    want, _ = expert_oracle.experts(single, indices, "gelu")
    got, dropped = compiled(implementation)(single, indices)
    assert_close(got, want, dtype=np.float32, length=6)
    assert dropped == 0


def test_what_finds_no_place_is_dropped():
    arrays, indices = arguments(23, 4, 2)
    single = narrow(arrays)
    want, want_dropped = expert_oracle.experts(single, indices, "relu", places=6)
    function = compiled("capacity", activation="relu", factor=0.5)
    got, dropped = function(single, indices)
    assert dropped == want_dropped > 0
    assert_close(got, want, dtype=np.float32, length=4)


@pytest.mark.parametrize("implementation", DERIVATIVES)
@pytest.mark.parametrize("check", [check_first_order, check_second_order])
def test_derivatives(check, implementation):
    # More choices than experts: `gather` reads some tokens after others.
    arrays, indices = arguments(5, 3, 2)
    point = {name: 0.7 * array for name, array in arrays.items()}

    def function(arrays):
        y, _ = run(arrays, indices, implementation)
        return jnp.sum(jnp.sin(y) + y)

    def oracle(arrays):
        y, _ = expert_oracle.experts(arrays, indices, "gelu")
        return float(np.sum(np.sin(y) + y))

    check(function, oracle, point)


@settings(max_examples=50)
@given(
    tokens=st.sampled_from([1, 5, 12]),
    count=st.sampled_from([1, 3, 9]),
    top_k=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_number_of_tokens_is_gathered_in_any_number_of_parts(
    tokens, count, top_k, seed
):
    arrays, indices = arguments(tokens, count, top_k, d_ff=1, biases=False, seed=seed)
    single = narrow(arrays)
    want, _ = expert_oracle.experts(single, indices, "gelu")
    got, _ = compiled("gather")(single, indices)
    # The terms may cancel: they are about as large as the numbers that were drawn.
    assert_close(got, want, dtype=np.float32, length=top_k + 3, terms=1.0)


def test_copies_are_no_larger_than_the_weights():
    arrays, indices = arguments(512, 256, 4, d_model=64)
    arrays = narrow(arrays)

    def temporary(implementation):
        def loss(arrays):
            return jnp.sum(run(arrays, indices, implementation)[0] ** 2)

        analysis = jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # The copies, their cotangents, and sums of these, each of two matrices an expert.
    weights = 2 * arrays["gate"].nbytes
    assert 8 * weights < temporary("reference")
    assert temporary("gather") < 4 * weights
