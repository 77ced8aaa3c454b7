"""Bad arguments of layers that learn as they read: the message names the argument."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.layers import MesaNet, TTTLinear


pytestmark = pytest.mark.errors
LAYERS: dict[str, Any] = {"TTTLinear": TTTLinear, "MesaNet": MesaNet}
each = pytest.mark.parametrize("name", LAYERS)


def build(name: str, **options: Any) -> Any:
    return LAYERS[name](
        **({"d_model": 4, "n_heads": 2, "key": jax.random.key(0)} | options)
    )


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        *((name, "d_model", value) for name in LAYERS for value in (0, -4, 4.0, "4")),
        *((name, "n_heads", value) for name in LAYERS for value in (0, -1, 1.5, True)),
        *((name, "norm_eps", value) for name in LAYERS for value in (0.0, -1e-6)),
        *(("TTTLinear", "mini_batch_size", value) for value in (0, -2, 1.5)),
        *(("TTTLinear", "inner_rate", value) for value in (0.0, -1.0, float("nan"))),
        *(("MesaNet", "d_conv", value) for value in (0, -1)),
        *(("MesaNet", "cg_steps", value) for value in (0, 2.5)),
        *(("MesaNet", "ridge_min", value) for value in (0.0, -0.1, float("inf"))),
        *(("MesaNet", "chunk_size", value) for value in (0, "8")),
    ],
)
def test_values_that_are_not_positive(name, argument, value):
    with refused(f"`{argument}`", str(value)):
        build(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "flag"),
    [("MesaNet", "gate")]
    + [("TTTLinear", flag) for flag in ("gate", "output_norm", "qk_norm")],
)
@pytest.mark.parametrize("value", ["no", 2])
def test_flags(name, flag, value):
    with refused(f"`{flag}` must be True or False", repr(value)):
        build(name, **{flag: value})


@each
def test_heads_that_do_not_divide_the_channels(name):
    with refused("`d_model`", "d_model=4", "n_heads=3", "multiple"):
        build(name, n_heads=3)


def test_an_unknown_solver():
    with refused("`solver`", "'cg', 'cholesky'", "Did you mean 'cholesky'"):
        build("MesaNet", solver="cholesk")


def test_an_unknown_implementation():
    with refused("`implementation`", "'xlaa'", "xla"):
        build("MesaNet", implementation="xlaa")


@each
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_a_sequence_of_length_zero(name, shape):
    layer = build(name)
    with refused(name, "`x`", "zero-length", str(shape)):
        layer(jnp.zeros(shape))
    with refused(name, "`x`", "zero-length", str(shape)):
        layer.prefill(jnp.zeros(shape), layer.init_cache(shape[:-2]))


@each
def test_inputs_of_another_shape(name):
    layer = build(name)
    with refused(name, "`x`", "(7, 5)"):
        layer(jnp.zeros((7, 5)))
    with refused(name, "`x`", "(4,)", "step"):
        layer(jnp.zeros(4))
    with refused(f"{name}.step", "`x`", "(2, 5)"):
        layer.step(jnp.zeros((2, 5)), layer.init_cache((2,)))
    with refused(name, "`x`", "floating point", "int32"):
        layer(jnp.zeros((7, 4), "int32"))


@each
@pytest.mark.parametrize("shape", [(2, 6), (7,), (2, 7, 1)])
def test_segment_ids_of_another_shape(name, shape):
    layer, ids = build(name), jnp.zeros(shape, "int32")
    with refused(name, "`segment_ids`", "(2, 7)", str(shape)):
        layer(jnp.zeros((2, 7, 4)), segment_ids=ids)


@each
def test_caches_of_something_else(name):
    layer = build(name)
    for other in (build(name, n_heads=1), build(name, d_model=6)):
        with refused(name, "`cache", "init_cache"):
            layer.step(jnp.zeros((2, 4)), other.init_cache((2,)))
    for cache in (None, (), build(name).init_cache((3,))):
        with refused(name, "`cache", "init_cache"):
            layer.prefill(jnp.zeros((2, 7, 4)), cache)
