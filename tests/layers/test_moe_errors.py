"""Bad arguments of feed-forward layers and of the experts: the message says the fix."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.kernels import experts
from capibara_eqx.layers import (
    GLU,
    MLP,
    ExpertLoad,
    MoE,
    SwiGLU,
    update_expert_load,
    update_selection_bias,
)


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)


def builder(layer, **defaults):
    return lambda **options: layer(**(defaults | options), key=KEY)


moe = builder(MoE, d_model=4, num_experts=3, top_k=2, d_ff=2)
glu = builder(GLU, d_model=4, d_ff=2)
swiglu = builder(SwiGLU, d_model=4, d_ff=2)
mlp = builder(MLP, d_model=4, d_ff=2)

SIZES = [
    (moe, ("d_model", "num_experts", "top_k", "d_ff", "shared_d_ff")),
    (glu, ("d_model", "d_ff")),
    (swiglu, ("d_model", "d_ff")),
    (mlp, ("d_model", "d_ff", "d_out")),
    (ExpertLoad, ("num_experts",)),
]


@pytest.mark.parametrize(
    ("build", "name"), [(build, name) for build, names in SIZES for name in names]
)
@pytest.mark.parametrize("value", [0, -2, 1.5, "3"])
def test_sizes_that_are_not_positive(build, name, value):
    with refused(f"`{name}`", "positive integer", str(value)):
        build(**{name: value})


CHOICES = [
    (moe, {"top_k": 4}, ["`top_k`", "`num_experts`", "4", "3", "swapped"]),
    (moe, {"score": "sigmoids"}, ["`score`", "Did you mean 'sigmoid'"]),
    (moe, {"activation": "silu"}, ["`activation`", "'swiglu'"]),
    (moe, {"capacity_factor": 0.0}, ["`capacity_factor`", "positive", "0.0", "1.25"]),
    (moe, {"capacity_factor": -1.0}, ["`capacity_factor`", "positive", "-1.0"]),
    (moe, {"capacity_factor": float("inf")}, ["`capacity_factor`", "finite"]),
    (moe, {"implementation": "capacity"}, ["`capacity_factor`", "needs"]),
    (
        moe,
        {"implementation": "scan", "capacity_factor": 1.0},
        ["`capacity_factor`", "'scan'", "drops no token"],
    ),
    (glu, {"activation": "swiglue"}, ["`activation`", "Did you mean 'swiglu'"]),
    (glu, {"activation": "gelu"}, ["`activation`", "Did you mean 'geglu'"]),
    (mlp, {"activation": "geglu"}, ["`activation`", "Did you mean 'gelu'"]),
    (mlp, {"dropout": 1.5}, ["`dropout`", "between 0 and 1", "1.5"]),
]


@pytest.mark.parametrize(("build", "options", "words"), CHOICES)
def test_arguments_that_do_not_fit(build, options, words):
    with refused(*words):
        build(**options)


def test_an_unknown_implementation():
    with refused("experts", "`implementation`", "'raged'", "Did you mean 'ragged'"):
        moe(implementation="raged")


@pytest.mark.parametrize("build", [moe, glu, swiglu, mlp])
@pytest.mark.parametrize("shape", [(5, 3), ()])
def test_a_wrong_last_axis(build, shape):
    layer = build()
    with refused(type(layer).__name__, "`x`", "4", str(shape), "width of its input"):
        layer(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(5,), (2,), (2, 5, 1), ()])
def test_a_mask_of_another_shape(shape):
    with refused("MoE", "`mask`", "(2, 5)", str(shape)):
        moe()(jnp.zeros((2, 5, 4)), mask=jnp.ones(shape, bool))


def test_a_mask_of_numbers():
    with refused("MoE", "`mask`", "boolean", "int32", "segment_ids >= 0"):
        moe()(jnp.zeros((5, 4)), mask=jnp.ones((5,), "int32"))


def test_active_dropout_without_a_key():
    with refused("Dropout", "`key`", "inference_mode"):
        mlp(dropout=0.5)(jnp.zeros((5, 4)))


def test_loads_that_do_not_fit():
    bias, load = jnp.zeros((3,)), jnp.zeros((2,))
    with refused("update_selection_bias", "`load`", "(3,)", "(2,)"):
        update_selection_bias(bias, load)
    with refused("`rate`", "positive", "-0.1"):
        update_selection_bias(bias, bias, -0.1)
    with refused("update_expert_load", "`load`", "(3,)", "(2,)"):
        update_expert_load(ExpertLoad(3), load)
    for decay in (1.0, -0.1):
        with refused("`decay`", str(decay), "below 1"):
            update_expert_load(ExpertLoad(3), bias, decay)


def run(**changes):
    arguments: dict[str, Any] = {
        "x": jnp.zeros((2, 5, 4)),
        "indices": jnp.zeros((2, 5, 2), "int32"),
        "weights": jnp.zeros((2, 5, 2)),
        "gate": jnp.zeros((3, 6, 4)),
        "up": jnp.zeros((3, 6, 4)),
        "down": jnp.zeros((3, 4, 6)),
    }
    return experts(**(arguments | changes))


WRONG = {
    "x": [((2, 5, 3), ["4", "`gate`"]), ((), ["4", "()"])],
    "indices": [((5, 2), ["(2, 5, 'top_k')"]), ((2, 5, 0), ["at least one"])],
    "weights": [((2, 5, 3), ["(2, 5, 2)", "`indices`"])],
    "gate": [((6, 4), ["(experts, d_ff, d_model)"]), ((0, 6, 4), ["zero"])],
    "up": [((3, 4, 6), ["(3, 6, 4)", "`gate`"])],
    "down": [((3, 6, 4), ["(3, 4, 6)"])],
    "gate_bias": [((3, 4), ["(3, 6)"])],
    "up_bias": [((6,), ["(3, 6)"])],
    "down_bias": [((3, 6), ["(3, 4)"])],
}


@pytest.mark.parametrize(
    ("argument", "shape", "words"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_operands_that_do_not_fit(argument, shape, words):
    dtype = "int32" if argument == "indices" else "float32"
    with refused("experts", f"`{argument}`", str(shape), *words):
        run(**{argument: jnp.zeros(shape, dtype)})


def test_options_of_the_experts_that_do_not_fit():
    with refused("experts", "`indices`", "integers", "float32", "astype"):
        run(indices=jnp.zeros((2, 5, 2)))
    with refused("`activation`", "Did you mean 'silu'"):
        run(activation="sillu")
    with refused("experts", "`up_bias`", "(3, 6)", "no `up`"):
        run(up=None, up_bias=jnp.zeros((3, 6)))
    with refused("`capacity_factor`", "positive", "-2"):
        run(capacity_factor=-2.0)
    with refused("experts", "`implementation`", "'dens'", "Did you mean 'dense'"):
        run(implementation="dens")


@pytest.mark.parametrize("name", ["ragged", "scan", "dense", "gather", "reference"])
def test_no_use_for_a_capacity(name):
    with pytest.raises(NotImplementedError, match="no use for `capacity_factor`"):
        run(implementation=name, capacity_factor=1.0)


def test_a_capacity_is_needed():
    with pytest.raises(NotImplementedError, match="needs a `capacity_factor`"):
        run(implementation="capacity")


def test_the_first_that_can_runs():
    assert run(implementation=("scan", "capacity"), capacity_factor=1.0)[1] > 0
    assert partial(run, implementation=("capacity", "scan"))()[1] == 0
