"""Models over two devices: rows of the batch apart, parameters shared."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.tolerances import assert_close

from capibara_eqx.models import mamba_language_model


def loss(model, tokens, segment_ids):
    return jnp.sum(jnp.sin(model(tokens, segment_ids=segment_ids)), axis=(1, 2))


@pytest.mark.parametrize(
    ("scan", "axis_type"),
    [(False, AxisType.Auto), (True, AxisType.Explicit)],
    ids=["list-auto", "scanned-explicit"],
)
def test_gradients_inside_shard_map(scan, axis_type):
    model = mamba_language_model(11, 4, 2, d_state=2, scan=scan, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (4, 9)).astype("int32")
    segment_ids = np.sort(rng.integers(-1, 3, (4, 9))).astype("int32")
    arrays, static = eqx.partition(model, eqx.is_array)

    def one_device(arrays, tokens, segment_ids):
        return loss(eqx.combine(arrays, static), tokens, segment_ids)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    two_devices = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
    )

    def gradient(function):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(function(*args))))

    want, want_gradient = gradient(one_device)(arrays, tokens, segment_ids)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        got, got_gradient = gradient(two_devices)(
            jax.device_put(arrays, whole),
            jax.device_put(tokens, rows),
            jax.device_put(segment_ids, rows),
        )
    assert_close(got, want, dtype="float32", length=tokens.size)
    leaves = jax.tree.leaves_with_path(want_gradient)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(got_gradient), strict=True):
        name = jax.tree_util.keystr(path)
        assert_close(other, leaf, dtype="float32", length=tokens.size, name=name)
