"""The experts over two devices, if there are two, each with tokens of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.derivatives import check_gradient
from support.expert_oracle import experts as expected

from capibara_eqx.kernels import experts


DEVICES = min(2, len(jax.devices()))
INDICES = np.asarray([[0, 2], [1, 0], [2, 1], [2, -1], [0, 1], [0, 2]], "int32")
SHAPES = {
    "x": (6, 2),
    "weights": (6, 2),
    "gate": (3, 2, 2),
    "up": (3, 2, 2),
    "down": (3, 2, 2),
    "down_bias": (3, 2),
}


def point():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def spec(name):
    return P("data") if name in ("x", "weights", "indices") else P()


def oracle(point):
    return float(np.sum(np.sin(expected(point, INDICES)[0])))


def placer(mesh):
    def place(point):
        return {
            name: jax.device_put(values, NamedSharding(mesh, spec(name)))
            for name, values in point.items()
        }

    return place


AUTO = ("ragged", "scan", "gather", "dense", "capacity")
# The axes that sorting minds, with what sorts; the others are alike.
EXPLICIT = [
    pytest.param(name, AxisType.Explicit, marks=pytest.mark.slow)
    for name in ("scan", "gather", "dense", "capacity")
]


@pytest.mark.parametrize(
    ("implementation", "axis_type"),
    [
        *[(name, AxisType.Auto) for name in AUTO],
        ("ragged", AxisType.Explicit),
        *EXPLICIT,
    ],
    ids=str,
)
def test_gradient_through_shard_map(implementation, axis_type):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    place = placer(mesh)
    factor = 3.0 if implementation == "capacity" else None

    def run(arrays):
        y, _ = experts(**arrays, capacity_factor=factor, implementation=implementation)
        return y

    names = [*SHAPES, "indices"]
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=({n: spec(n) for n in names},), out_specs=P("data")
    )

    def loss(point):
        return jnp.sum(jnp.sin(sharded(point | place({"indices": INDICES}))))

    with jax.set_mesh(mesh):
        check_gradient(loss, oracle, point(), place)


@pytest.mark.parametrize("implementation", [None, "scan", "dense"])
def test_gradient_of_tokens_sharded_by_type(implementation):
    """Where tokens cannot be sorted, the default is the scan."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    place = placer(mesh)

    def loss(point):
        indices = place({"indices": INDICES})
        y, _ = experts(**point, **indices, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    with jax.set_mesh(mesh):
        check_gradient(loss, oracle, point(), place)


@pytest.mark.parametrize(
    "implementation", ["ragged", "gather", "reference", "capacity"]
)
def test_what_sorts_tokens_refuses_an_explicit_axis(implementation):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    factor = 1.0 if implementation == "capacity" else None
    arrays = {name: jnp.asarray(values, "float32") for name, values in point().items()}
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="Explicit axis.*shard_map"),
    ):
        experts(
            **placer(mesh)(arrays | {"indices": jnp.asarray(INDICES)}),
            capacity_factor=factor,
            implementation=implementation,
        )
