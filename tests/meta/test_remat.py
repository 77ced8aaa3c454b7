"""What is kept for outer gradients changes memory and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import quick_jit
from support.tolerances import assert_close

from capibara_eqx.meta import Task, adapt_trajectory, maml, sgd


pytestmark = pytest.mark.slow


def loss(model, batch, *, key=None):
    x, y = batch
    if key is not None:
        y = y + jax.random.normal(key, y.shape)
    for weight in model[:-1]:
        x = jnp.tanh(x @ weight)
    return jnp.mean((x @ model[-1] - y) ** 2)


def problem(width, layers, samples):
    rng = np.random.default_rng(0)
    sizes = [1, *[width] * (layers - 1), 1]
    model = [
        jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), "float32")
        for shape in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    x, y = jnp.asarray(rng.standard_normal((2, samples, 1)), "float32")
    return model, Task((x, y), (x, y))


@functools.cache
def of(steps, remats):
    """Loss, its gradient and the whole path, for each way to keep things."""

    def compute(model, task, key):
        found = []
        for remat in remats:
            how = {"optimizer": sgd(0.1), "steps": steps, "remat": remat}
            after = maml(loss, **how)
            path = adapt_trajectory(loss, model, task.support, **how, key=key)
            found.append((jax.value_and_grad(after)(model, task, key=key), path))
        return found

    arguments = (*problem(3, 2, 4), jax.random.key(0))
    return jax.tree.map(np.asarray, quick_jit(compute)(*arguments))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7, 16, 17])
def test_values_and_gradients_are_the_same(steps):
    plain, *others = of(steps, (None, "step", "nested"))
    for other in others:
        leaves = zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True)
        for got, want in leaves:
            assert_close(got, want, dtype="float32", length=16)


def test_memory_of_an_outer_gradient():
    model, task = problem(128, 4, 256)

    def temporary(remat):
        after = maml(loss, optimizer=sgd(0.01), steps=64, remat=remat)
        compiled = jax.jit(jax.grad(after)).lower(model, task).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    sizes = {remat: temporary(remat) for remat in (None, "step", "nested")}
    assert sizes["step"] < sizes[None] / 10, sizes
    assert sizes["nested"] < sizes[None] / 20, sizes
