"""Bad arguments of `MetaLA`: the message names the argument and says what to do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused
from support.metala_oracle import small_layer

from capibara_eqx.meta import AdaptedParams, MetaLA
from capibara_eqx.transforms import Affine, Rule, quantize


pytestmark = pytest.mark.errors
KEY = jax.random.key(0)
LAYER: Any = small_layer("anil", 0)
X = np.ones((5, 3, 4), "float32")
Y = np.ones((5, 3, 3), "float32")


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("d_model", [0, -4, 4.5]),
        ("n_heads", [0, 3]),
        ("d_out", [0, -1, 2.5, True]),
        ("dropout_rate", [-0.1, 1.5]),
        ("adaptation_steps", [-1, 1.5, True]),
        ("inner_rate", [0.0, -1.0, float("nan"), float("inf")]),
        ("method", ["Ridge", "reptile", None]),
    ],
)
def test_constructor(argument, values):
    for value in values:
        options: Any = {"d_model": 4, "n_heads": 2, "d_out": 3, argument: value}
        with refused(argument, str(value)):
            MetaLA(**options, key=KEY)


def test_odd_heads():
    with refused("head_dim", "even", "3"):
        MetaLA(6, 2, 3, key=KEY)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X[0], Y[0], ["support_x", "one task", "(3, 4)", "support_x[None]"]),
        (X[None], Y[None], ["support_x", "one task", "jax.vmap"]),
        (X[..., :3], Y, ["support_x", "4 elements", "(5, 3, 3)"]),
        (X.astype("int32"), Y, ["support_x", "floating point", "int32"]),
        (X[:0], Y[:0], ["support_x", "at least one example", "(0, 3, 4)"]),
        (X[:, :0], Y[:, :0], ["support_x", "zero-length"]),
        (X, Y[..., :2], ["support_y", "d_out=3", "(5, 3, 3)", "(5, 3, 2)"]),
        (X, Y[:4], ["support_y", "(5, 3)", "(4, 3, 3)"]),
        (X, Y[0, 0].astype("int32"), ["support_y", "labels", "(5,)", "(3,)"]),
        (X, Y > 0, ["support_y", "bool", "astype(jnp.int32)"]),
        (X, np.array([0, 1, 2, 3, 0]), ["support_y", "between 0 and 2", "classes"]),
        (X, np.array([0, 1, 2, -1, 0]), ["support_y", "between 0 and 2"]),
    ],
)
def test_support(x, y, words):
    kind = RuntimeError if "between 0 and 2" in words else ValueError
    y = y.astype("int32") if y.dtype == "int64" else y
    with pytest.raises(kind) as caught:
        LAYER.fast_adapt(jnp.asarray(x), jnp.asarray(y), jnp.asarray(X))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.slow
def test_label_out_of_range_under_jit():
    adapt = eqx.filter_jit(
        lambda y: LAYER.fast_adapt(jnp.asarray(X), y, jnp.asarray(X))
    )
    with pytest.raises(RuntimeError, match="`support_y` must lie between 0 and 2"):
        adapt(jnp.array([0, 1, 2, 3, 0]))


def test_query():
    params = AdaptedParams(LAYER.meta_weights, pooled=False)
    for x, words in (
        (X[..., :3], ["query_x", "4 elements"]),
        (X[:0], ["query_x", "at least one example"]),
        (X[0], ["query_x", "one task"]),
    ):
        with refused(*words):
            LAYER.apply_adapted_params(jnp.asarray(x), params)
    with refused("params", "adapt_parameters", "FewShotNet"):
        LAYER.apply_adapted_params(jnp.asarray(X), LAYER.meta_weights)


def test_meta_weights_of_another_layer():
    other = small_layer("maml", 0).meta_weights
    with refused("meta_weights", "method='anil'", "encoder/attention/q_proj/weight"):
        LAYER.adapt_parameters(other, jnp.asarray(X), jnp.asarray(Y))
    wider = small_layer("anil", 0, 6).meta_weights
    with refused("meta_weights", "head/weight", "(3, 6)", "(3, 4)"):
        LAYER.with_meta_weights(wider)


def test_dropout_needs_a_key():
    layer = small_layer("anil", 0, dropout_rate=0.1)
    x, y = jnp.asarray(X), jnp.asarray(Y)
    with refused("key", "inference_mode"):
        eqx.filter_eval_shape(layer, x)
    with refused("key", "inference_mode"):
        eqx.filter_eval_shape(layer.fast_adapt, x, y, x)


def test_input():
    with refused("MetaLA", "x", "(*batch, seq, 4)"):
        LAYER(jnp.ones(4))
    with refused("segment_ids", "(5, 3)"):
        LAYER(jnp.asarray(X), segment_ids=jnp.zeros((5,), "int32"))


@pytest.mark.slow
def test_rate_that_diverges_is_reported():
    layer = eqx.tree_at(lambda layer: layer.inner_rate, LAYER, jnp.asarray(1e38))
    with pytest.raises(RuntimeError, match="not finite at step 2"):
        layer.fast_adapt(jnp.asarray(X), jnp.asarray(Y), jnp.asarray(X))


def test_ridge_of_a_head_in_codes():
    layer = small_layer("ridge", 0)
    layer, _ = quantize(layer, [Rule("net/head/weight", Affine(8))])
    x, y = jnp.asarray(X), jnp.asarray(Y)
    with refused("net/head/weight", "AffineArray", "rules"):
        eqx.filter_eval_shape(layer.fast_adapt, x, y, x)
