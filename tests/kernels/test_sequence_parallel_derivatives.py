"""Derivatives over a sequence that is cut over the devices, if there are several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from support.derivatives import check_first_order, check_gradient, check_second_order
from support.kernel_cases import cast, split_fixed
from support.sequence_cases import (
    CASES,
    EVEN,
    UNEVEN,
    every,
    grid,
    line,
    losses,
    over,
    placed,
    recurrence,
    several,
)
from support.tolerances import assert_close

from capibara_eqx.kernels import linear_recurrence


pytestmark = several
slow = pytest.mark.slow
BORDER = EVEN // 2


@every
def test_gradient_with_rows_sharded_too(case):
    smooth, fixed = split_fixed(case.make(EVEN))
    mesh = grid()
    place = functools.partial(placed, mesh=mesh)
    check_gradient(*losses(case, fixed, mesh, place), smooth, place)


@pytest.mark.parametrize("seq", [EVEN, pytest.param(UNEVEN, marks=slow)])
@pytest.mark.parametrize("name", ["recurrence", "conv_depthwise", "scan_plain_steps"])
def test_gradient_over_explicit_axes(name, seq):
    case, mesh = CASES[name], line(AxisType.Explicit)
    smooth, fixed = split_fixed(case.make(seq))
    place = functools.partial(placed, mesh=mesh)
    with jax.set_mesh(mesh):
        check_gradient(*losses(case, fixed, mesh, place), smooth, place)


@slow
@pytest.mark.parametrize("name", ["recurrence", "conv_depthwise", "scan_plain_steps"])
def test_gradient_over_axes_of_both_types(name):
    case, mesh = CASES[name], grid(AxisType.Explicit, AxisType.Auto)
    smooth, fixed = split_fixed(case.make(UNEVEN))
    place = functools.partial(placed, mesh=mesh)
    with jax.set_mesh(mesh):
        check_gradient(*losses(case, fixed, mesh, place), smooth, place)


def unplaced(point):
    return {name: jnp.asarray(values) for name, values in point.items()}


@pytest.mark.parametrize(
    "name",
    [
        "recurrence",
        *(pytest.param(n, marks=slow) for n in CASES if n != "recurrence"),
    ],
)
def test_every_derivative_of_uneven_pieces(name):
    case = CASES[name]
    smooth, fixed = split_fixed(case.make(UNEVEN))
    pair = losses(case, fixed, line(), unplaced)
    check_first_order(*pair, smooth)
    check_second_order(*pair, smooth)


@slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@every
def test_second_order_of_rows_sharded_too(case, axis_type):
    mesh = grid(axis_type)
    smooth, fixed = split_fixed(case.make(UNEVEN))
    place = functools.partial(placed, mesh=mesh)
    with jax.set_mesh(mesh):
        check_second_order(*losses(case, fixed, mesh, unplaced), smooth)
        check_gradient(*losses(case, fixed, mesh, place), smooth, place)


def test_gradients_stay_finite_where_an_overflow_is_hidden():
    arguments = recurrence(EVEN)
    arguments["reset"] = np.arange(EVEN) == np.full((2, 1), BORDER)
    inputs = cast(arguments, "float32")
    inputs["x"] = inputs["x"].at[:, 0].set(jnp.inf)

    def loss(x, function):
        h, last = function(**{**inputs, "x": x})
        return jnp.sum(h[:, BORDER:] ** 2) + jnp.sum(last)

    sharded = over(CASES["recurrence"], line())
    got = jax.jit(jax.grad(lambda x: loss(x, sharded)))(inputs["x"])
    want = jax.jit(jax.grad(lambda x: loss(x, linear_recurrence)))(inputs["x"])
    late = slice(BORDER, EVEN)
    assert_close(got[:, late], want[:, late], dtype="float32", length=EVEN)
