"""The float64 references of the state space benchmarks, beside the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _harness, _ssd_oracle, s4d, ssd
from benchmarks.mamba2_decode import layer_weights
from capibara_eqx.kernels._ssd.specs import Spec
from capibara_eqx.layers import S4D, Mamba2


def test_the_dual_and_its_gradients():
    inputs, dy = ssd.ssd_inputs(Spec("odd", 2, 67, 4, 3, 2, 5))
    y, gradients = _ssd_oracle.ssd_gradients(*inputs, dy=dy)
    np.testing.assert_allclose(y, _ssd_oracle.ssd(*inputs), rtol=1e-12)
    scan = ssd.library_scan(implementation="reference")
    got = _harness.with_gradients(scan, jnp.asarray(dy))(*map(jnp.asarray, inputs))
    # Sums over at most 134 tokens of numbers rounded to 6e-8.
    assert _harness.max_error(got, (y, gradients)) < 8e-6
    wrong = (y, tuple(g * 1.001 for g in gradients))
    assert _harness.max_error(got, wrong) > 5e-4


def test_the_mamba2_layer():
    layer = Mamba2(8, 5, head_dim=4, key=jax.random.key(0))
    x = np.random.default_rng(1).standard_normal((2, 19, 8)).astype("float32")
    want = _ssd_oracle.mamba2(layer_weights(layer), x)
    assert _harness.max_error(layer(jnp.asarray(x)), want) < 2e-6


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_the_s4d_layer(mode):
    layer = S4D(3, 4, mode="recurrent", key=jax.random.key(0))
    x, dy = np.random.default_rng(2).standard_normal((2, 33, 3)).astype("float32")
    y, pullback = jax.vjp(layer, jnp.asarray(x)[None])
    if mode == "forward":
        got, want = y, s4d.expected(layer, x, None)
    else:
        got = (y, *pullback(jnp.asarray(dy)[None]))
        want = s4d.expected(layer, x, dy[None])
    assert _harness.max_error(got, want) < 4e-6
