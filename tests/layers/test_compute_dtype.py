"""What is cast to a narrow dtype to compute with, and what is not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from support.quick import filled

from capibara_eqx.layers import Embedding, Mamba, RMSNorm, cast_for_compute


class Turning(eqx.Module):
    weight: jax.Array
    phases: jax.Array
    steps: int = 3


def test_matrices_are_cast_and_what_needs_its_digits_is_not():
    layers = {
        "mamba": filled(Mamba, 2, 2, bias=True, seed=0, size=1.0),
        "norm": RMSNorm(3),
        "table": filled(Embedding, 3, 2, seed=1, size=1.0),
        "turning": Turning(jnp.ones((2, 2)), jnp.asarray([[1 + 2j]], "complex64")),
    }
    cast = cast_for_compute(layers, jnp.bfloat16)
    mamba = cast["mamba"]
    narrow = [
        *(mamba.in_proj.weight, mamba.conv.weight, mamba.out_proj.weight),
        *(cast["table"].weight, cast["turning"].weight),
    ]
    assert {leaf.dtype.name for leaf in narrow} == {"bfloat16"}
    kept = [mamba.A_log, mamba.D, mamba.in_proj.bias, cast["norm"].weight]
    assert {leaf.dtype.name for leaf in kept} == {"float32"}
    np.testing.assert_array_equal(cast["turning"].phases, layers["turning"].phases)
    assert cast["turning"].steps == 3
