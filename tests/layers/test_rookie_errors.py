"""Bad arguments of both layers named after rookies: the message says the fix."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.messages import refused

from capibara_eqx.layers import MLP, Linear, MixtureOfRookies, RookiePredictor


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
SIZES = ("d_model", "num_rookies", "rookie_size", "top_k", "n_heads", "d_key")


def rookies(**options):
    sizes: dict[str, Any] = {
        "d_model": 4,
        "num_rookies": 9,
        "rookie_size": 1,
        "top_k": 2,
    }
    return MixtureOfRookies(**(sizes | options), key=KEY)


peer = partial(rookies, routing="product_key")


def predictor(linear=None, shape=(5, 4), **options):
    linear = Linear(4, 3, key=KEY) if linear is None else linear
    return RookiePredictor(linear, jax.random.normal(KEY, shape), **options)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -2, 1.5, "3"])
def test_sizes_that_are_not_positive(name, value):
    with refused(f"`{name}`", "positive integer", str(value)):
        peer(**{name: value})


CHOICES = [
    ({"top_k": 10}, ["`top_k`", "`num_rookies`", "10", "9", "swapped"]),
    ({"activation": "swiglu"}, ["`activation`", "Did you mean 'silu'"]),
    ({"routing": "product_keys"}, ["`routing`", "Did you mean 'product_key'"]),
    ({"implementation": "raged"}, ["`implementation`", "Did you mean 'ragged'"]),
    ({"implementation": "capacity"}, ["drop", "MoE", "`capacity_factor`"]),
    ({"n_heads": 2}, ["`n_heads`", "product_key", "n_heads=2"]),
    ({"d_key": 2}, ["`d_key`", "product_key", "d_key=2"]),
    ({"query_norm": True}, ["`query_norm`", "product_key", "query_norm=True"]),
    ({"query_norm": "rms"}, ["`query_norm`", "True or False", "'rms'"]),
]


@pytest.mark.parametrize(("options", "words"), CHOICES)
def test_arguments_that_do_not_fit(options, words):
    with refused(*words):
        rookies(**options)


@pytest.mark.parametrize(("count", "nearest"), [(32, (25, 36)), (2, (1, 4))])
def test_product_keys_of_no_square(count, nearest):
    with refused("`num_rookies`", "square", str(count), *map(str, nearest)):
        peer(num_rookies=count)


@pytest.mark.parametrize("build", [rookies, peer, predictor])
@pytest.mark.parametrize("shape", [(5, 3), ()])
def test_a_wrong_last_axis(build, shape):
    layer = build()
    with refused(type(layer).__name__, "`x`", "4", str(shape), "width of its input"):
        layer(jnp.zeros(shape))


@pytest.mark.parametrize("build", [rookies, peer, predictor])
def test_masks_that_do_not_fit(build):
    layer = build()
    name = type(layer).__name__
    for shape in [(5,), (2,), (2, 5, 1), ()]:
        with refused(name, "`mask`", "(2, 5)", str(shape)):
            layer(jnp.zeros((2, 5, 4)), mask=jnp.ones(shape, bool))
    with refused(name, "`mask`", "boolean", "int32", "segment_ids >= 0"):
        layer(jnp.zeros((5, 4)), mask=jnp.ones((5,), "int32"))


def test_product_keys_refuse_tokens_that_are_sharded_by_type():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match=r"Explicit axis.*shard_map"),
    ):
        peer()(jax.device_put(jnp.zeros((2, 4)), place))


WRONG = [
    ({"linear": MLP(4, 3, key=KEY)}, ["`linear`", "MLP", "in front of the ReLU"]),
    (
        {"linear": eqx.nn.Linear(4, "scalar", key=KEY)},
        ["`linear`", "between vectors", "(4, 'scalar')"],
    ),
    ({"shape": (5, 3)}, ["`samples`", "4", "(5, 3)"]),
    ({"shape": (4,)}, ["`samples`", "two inputs or more", "(4,)"]),
    ({"shape": (0, 2, 4)}, ["`samples`", "two inputs or more", "(0, 2, 4)"]),
    ({"max_angle": 181.0}, ["`max_angle`", "0 and 180", "181"]),
    ({"max_angle": -1.0}, ["`max_angle`", "0 and 180", "-1"]),
    ({"max_angle": float("nan")}, ["`max_angle`", "finite"]),
    ({"min_correlation": 1.5}, ["`min_correlation`", "0 and 1", "1.5"]),
    ({"threshold": float("nan")}, ["`threshold`", "number", "nan", "-jnp.inf"]),
    ({"threshold": None}, ["`threshold`", "number", "None"]),
    ({"threshold": False}, ["`threshold`", "number", "False"]),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_predictors_that_do_not_fit(options, words):
    with refused(*words):
        predictor(**options)
