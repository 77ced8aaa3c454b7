"""A node of another dtype stands for the same array, rounded once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara_eqx.arrays import NM, Affine, FakeQuantArray, Ternary, compress


SPECS = [Affine(4, group_size=3, symmetric=False), Ternary(), NM(2, 4)]
WEIGHT = np.random.default_rng(0).standard_normal((2, 3, 8)).astype("float32")


@pytest.mark.parametrize("make", [compress, FakeQuantArray.of])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_astype(spec, make):
    node = make(jnp.asarray(WEIGHT), spec)
    narrow = node.astype("bfloat16")
    assert narrow.dtype == jnp.bfloat16
    assert narrow.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow.dense(), node.dense().astype("bfloat16"))
    # All that it keeps stays as it is.
    for left, right in zip(jax.tree.leaves(narrow), jax.tree.leaves(node), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(narrow.astype("float32").dense(), node.dense())
