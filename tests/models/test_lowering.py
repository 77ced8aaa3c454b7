"""A model and its gradient lower for machines that are not here."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.tolerances import assert_close

from capibara_eqx.models import mamba_language_model, transformer_language_model


# The platforms read rows of a batch in different ways if there are many states.
ROWS, D_INNER, D_STATE = 2, 128, 16
PLATFORMS = ("cpu", "cuda", "tpu")


def gradient_of_a_model(implementation=None):
    model = mamba_language_model(
        11,
        D_INNER // 2,
        1,
        d_state=D_STATE,
        implementation=implementation,
        key=jax.random.key(0),
    )
    arrays, static = eqx.partition(model, eqx.is_array)

    def loss(arrays, tokens):
        return jnp.mean(jnp.square(eqx.combine(arrays, static)(tokens)))

    return jax.jit(jax.value_and_grad(loss)), arrays


@pytest.mark.parametrize(
    ("implementation", "platforms"),
    [(None, ("cuda",)), (None, ("tpu",)), ("xla", PLATFORMS)],
    ids=str,
)
def test_a_gradient_lowers(implementation, platforms):
    function, arrays = gradient_of_a_model(implementation)
    tokens = jax.ShapeDtypeStruct((ROWS, 40), jnp.int32)
    exported = export.export(function, platforms=platforms)(arrays, tokens)
    assert exported.platforms == platforms
    assert len(exported.out_avals) == 1 + len(jax.tree.leaves(arrays))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_gradient_of_a_transformer_lowers(platform):
    """With experts, so many tokens that attention runs in blocks, and padding."""
    model = transformer_language_model(
        11, 8, 1, 2, num_experts=3, implementation="blockwise", key=jax.random.key(0)
    )
    arrays, static = eqx.partition(model, eqx.is_array)

    def loss(arrays, tokens, ids):
        logits = eqx.combine(arrays, static)(tokens, segment_ids=ids)
        return jnp.mean(jnp.square(logits))

    tokens = jax.ShapeDtypeStruct((2, 600), jnp.int32)
    function = jax.jit(jax.value_and_grad(loss))
    exported = export.export(function, platforms=(platform,))(arrays, tokens, tokens)
    assert exported.platforms == (platform,)
    assert len(exported.out_avals) == 1 + len(jax.tree.leaves(arrays))


def test_what_was_exported_computes_the_same():
    function, arrays = gradient_of_a_model("xla")
    tokens = np.random.default_rng(0).integers(0, 11, (ROWS, 40)).astype("int32")
    exported = export.export(function, platforms=PLATFORMS)(arrays, tokens)
    got, want = exported.call(arrays, tokens), function(arrays, tokens)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(leaf, other, dtype="float32", length=tokens.size)
