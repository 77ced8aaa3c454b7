"""Attention over two devices, if there are two: in `shard_map`, and sharded by type."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import attention_oracle
from support.derivatives import check_gradient
from support.kernel_cases import random_segment_ids, smooth_loss

from capibara_eqx.kernels import attention
from capibara_eqx.kernels._attention import blockwise


DEVICES = min(2, len(jax.devices()))
RNG = np.random.default_rng(0)
POINT = {
    "query": RNG.standard_normal((2, 5, 4, 2)),
    "key": RNG.standard_normal((2, 7, 2, 2)),
    "value": RNG.standard_normal((2, 7, 2, 3)),
}
IDS = {
    "query_segments": random_segment_ids(RNG, (2, 5)),
    "key_segments": random_segment_ids(RNG, (2, 7)),
}
each = pytest.mark.parametrize("implementation", ["reference", "blockwise"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", (4, 3))


def mesh_of(axis_type):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))

    def place(arrays):
        sharding = NamedSharding(mesh, P("data"))
        return {name: jax.device_put(x, sharding) for name, x in arrays.items()}

    return mesh, place


def oracle(point):
    loop: Any = attention_oracle.attention
    y = loop(**point, **IDS, is_causal=True)
    return float(smooth_loss(np, [y]))


@each
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradient_through_shard_map(implementation, axis_type):
    mesh, place = mesh_of(axis_type)

    def run(arrays):
        return attention(**arrays, is_causal=True, implementation=implementation)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    loss = lambda point: smooth_loss(jnp, [sharded({**point, **place(IDS)})])
    with jax.set_mesh(mesh):
        check_gradient(loss, oracle, POINT, place)


@each
def test_gradient_of_rows_sharded_by_type(implementation):
    mesh, place = mesh_of(AxisType.Explicit)

    def loss(point):
        ids = place(IDS)
        y = attention(**point, **ids, is_causal=True, implementation=implementation)
        return smooth_loss(jnp, [y])

    with jax.set_mesh(mesh):
        check_gradient(loss, oracle, POINT, place)
