"""What is kept of the load from call to call: its mean, and the selection bias."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.tolerances import assert_close

from capibara_eqx.layers import ExpertLoad, update_expert_load, update_selection_bias


seeds = st.integers(0, 2**32 - 1)


def test_one_step_of_the_selection_bias():
    bias = jnp.asarray([0.5, 0.0, -0.25])
    load = jnp.asarray([0.5, 1 / 3, 1 / 6])
    got = update_selection_bias(bias, load, 0.125)
    np.testing.assert_array_equal(got, [0.375, 0.0, -0.125])
    for count in (3, 7, 49):
        even = jnp.ones((count,)) / count
        np.testing.assert_array_equal(
            update_selection_bias(jnp.zeros(count), even), np.zeros(count)
        )
    np.testing.assert_array_equal(update_selection_bias(bias, jnp.zeros(3)), bias)


@given(seed=seeds, decay=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_the_running_load_is_right_from_the_start(seed, decay):
    loads = np.random.default_rng(seed).dirichlet(np.ones(4), 6).astype("float32")
    running, weights = ExpertLoad(4), []
    np.testing.assert_array_equal(running.value, np.zeros(4))
    for index, load in enumerate(loads):
        running = update_expert_load(running, jnp.asarray(load), decay)
        weights = [decay * w for w in weights] + [1 - decay]
        want = np.asarray(weights) @ loads[: index + 1] / np.sum(weights)
        assert_close(running.value, want, dtype="float32", length=6)
        assert_close(np.sum(running.value), 1.0, dtype="float32", length=4)
    idle = update_expert_load(running, jnp.zeros(4), decay)
    np.testing.assert_array_equal(idle.value, running.value)
