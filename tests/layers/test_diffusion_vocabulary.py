"""A diffusion head that learns a small vocabulary, and gives it back."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.quick import built

from capibara_eqx.layers import (
    DiffusionNextTokenHead,
    NoiseSchedule,
    SamplingSchedule,
)


VOCAB, WIDTH, TRAINING = 7, 8, 1000


@functools.cache
def trained() -> tuple[DiffusionNextTokenHead, jax.Array, jax.Array]:
    """A head that has seen a table of rows of unlike length, and its conditions."""
    keys = jax.random.split(jax.random.key(0), 4)
    size = jnp.exp(jax.random.normal(keys[0], (VOCAB, 1)))
    table = 0.02 * size * jax.random.normal(keys[1], (VOCAB, WIDTH))
    conditions = jax.random.normal(keys[2], (VOCAB, WIDTH))
    head = built(DiffusionNextTokenHead, WIDTH, time_embed_dim=16, key=keys[3])
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, TRAINING))
    # Of what each condition is followed by: any map but the identity.
    after = (jnp.arange(VOCAB) * 3 + 2) % VOCAB

    @eqx.filter_jit
    def train(head):
        arrays, static = eqx.partition(head, eqx.is_inexact_array)

        def step(carry, key):
            arrays, state = carry

            def loss(arrays):
                batch = jnp.tile(jnp.arange(VOCAB), 32)
                return eqx.combine(arrays, static).loss(
                    conditions[batch], table[after[batch]], key=key
                )

            value, grads = jax.value_and_grad(loss)(arrays)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state)
            return (eqx.apply_updates(arrays, updates), state), value

        start = (arrays, optimizer.init(arrays))
        (arrays, _), losses = jax.lax.scan(
            step, start, jax.random.split(keys[0], TRAINING)
        )
        return eqx.combine(arrays, static), losses

    head, losses = train(head)
    assert losses[-50:].mean() < 0.4 * losses[:5].mean()
    return eqx.nn.inference_mode(head), table, conditions


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm"])
def test_a_small_vocabulary_is_recovered(scheduler):
    head, table, conditions = trained()
    chain = SamplingSchedule(NoiseSchedule(), 12, scheduler)
    head = eqx.tree_at(lambda h: h.schedule, head, chain)
    rows = jnp.tile(conditions, (100, 1))
    want = np.tile((np.arange(VOCAB) * 3 + 2) % VOCAB, 100)
    sample = eqx.filter_jit(lambda h, x, t, k: h.sample_token(x, t, key=k))
    got = np.asarray(sample(head, rows, table, jax.random.key(1)))
    assert np.mean(got == want) > 0.95


def test_without_a_condition_all_tokens_are_drawn():
    head, table, _ = trained()
    alone = eqx.tree_at(lambda h: h.cfg_guidance_scale, head, 0.0)
    ids = eqx.filter_jit(lambda x: alone.sample_token(x, table, key=jax.random.key(2)))(
        jnp.zeros((700, WIDTH))
    )
    counts = np.bincount(np.asarray(ids), minlength=VOCAB)
    assert len(counts) == VOCAB
    assert counts.min() > 20
