"""What the documents promise of meta-learning attention: training, few-shot use."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.meta import MetaLA, Task, init_meta_state, make_meta_step


jit: Any = eqx.filter_jit
quick = functools.partial(jit, compiler_options={"xla_backend_optimization_level": 0})
D_MODEL, SEQ, D_OUT = 4, 3, 2
SHARED = np.random.default_rng(0).standard_normal((D_MODEL, 2))


def sample_tasks(num_tasks: int, seed: int, shots: int = 8):
    """Targets are a few functions that all tasks share, mixed anew in every task.

    The mixture has mean zero whatever the input, so the best that a network can do
    without adapting is to predict zero.
    """
    rng = np.random.default_rng(seed)
    mixture = rng.standard_normal((num_tasks, 1, 2, D_OUT))
    task = {}
    for part in ("support", "query"):
        x = rng.standard_normal((num_tasks, shots, SEQ, D_MODEL))
        y = np.tanh(x @ SHARED) @ mixture
        task |= {
            f"{part}_x": jnp.asarray(x, "float32"),
            f"{part}_y": jnp.asarray(y, "float32"),
        }
    return task


def layer_of(method: str, **options: Any) -> MetaLA:
    options = {"dropout_rate": 0.0, "method": method, **options}
    layer = filled(MetaLA, D_MODEL, 1, D_OUT, seed=1, size=0.4, **options)
    ones = jnp.ones(D_MODEL)

    def where(layer):
        encoder = layer.net.encoder
        norms = (encoder.attention_norm, encoder.feed_forward_norm, layer.net.norm)
        return [norm.weight for norm in norms]

    layer = eqx.tree_at(where, layer, [ones] * 3)
    if layer.inner_rate is None:
        return layer
    return eqx.tree_at(lambda layer: layer.inner_rate, layer, jnp.asarray(0.5))


# The training loop of the documents: the outer optimiser of `meta_weights` alone.
meta_optimizer = optax.adam(learning_rate=0.02)


def task_loss(meta_layer, meta_weights, task):
    adapted_params = meta_layer.adapt_parameters(
        meta_weights, task["support_x"], task["support_y"]
    )
    predictions = meta_layer.apply_adapted_params(task["query_x"], adapted_params)
    return jnp.mean((predictions - task["query_y"]) ** 2)


@quick
def meta_train_step(meta_layer, meta_weights, meta_opt_state, task_batch):
    def meta_loss(meta_weights):
        one = functools.partial(task_loss, meta_layer, meta_weights)
        return jnp.mean(jax.vmap(one)(task_batch))

    loss, grads = jax.value_and_grad(meta_loss)(meta_weights)
    with jax.numpy_dtype_promotion("standard"):
        updates, meta_opt_state = meta_optimizer.update(grads, meta_opt_state)
    return optax.apply_updates(meta_weights, updates), meta_opt_state, loss


def meta_train(meta_layer, steps, num_tasks=8):
    meta_weights = meta_layer.meta_weights
    meta_opt_state = meta_optimizer.init(meta_weights)
    losses = []
    for iteration in range(steps):
        task_batch = sample_tasks(num_tasks, seed=iteration)
        meta_weights, meta_opt_state, loss = meta_train_step(
            meta_layer, meta_weights, meta_opt_state, task_batch
        )
        losses.append(float(loss))
    return meta_layer.with_meta_weights(meta_weights), losses


@pytest.mark.slow
def test_the_training_loop_learns():
    """Far below the start, and what not adapting could do at best."""
    layer = layer_of("maml", adaptation_steps=2)
    trained, losses = meta_train(layer, 60)
    start, end = np.mean(losses[:10]), np.mean(losses[-10:])
    without = np.mean([np.mean(sample_tasks(8, i)["query_y"] ** 2) for i in range(10)])
    assert end < 0.5 * start
    assert end < 0.25 * without
    assert not eqx.tree_equal(trained.meta_weights, layer.meta_weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maml", "anil", "ridge"])
def test_the_whole_layer_learns(method):
    """Encoder, start and rate or penalty, by the outer step of this package."""
    layer = layer_of(method, adaptation_steps=2)

    def query_loss(layer, task, *, key=None):
        y = layer.fast_adapt(*task.support, task.query[0], key=key)
        return jnp.mean((y - task.query[1]) ** 2)

    optimizer = optax.adam(0.01)
    step = make_meta_step(optimizer, query_loss)
    state = init_meta_state(layer, optimizer)
    losses = []
    for iteration in range(150):
        t = sample_tasks(8, seed=iteration)
        task = Task((t["support_x"], t["support_y"]), (t["query_x"], t["query_y"]))
        state, loss = step(state, task)
        losses.append(float(loss))
    start, end = np.mean(losses[:10]), np.mean(losses[-10:])
    assert end < 0.5 * start
    name = "log_lambda" if method == "ridge" else "inner_rate"
    assert getattr(state.model, name) != getattr(layer, name)


@quick
def logits_of(layer, support_x, support_y, query_x):
    return layer.fast_adapt(support_x=support_x, support_y=support_y, query_x=query_x)


def in_categories(labels, seq: int, width: int, seed: int):
    """A noisy sequence around one of two points for each label."""
    points = np.random.default_rng(99).standard_normal((2, width))
    noise = np.random.default_rng(seed).standard_normal((len(labels), seq, width))
    return jnp.asarray(points[labels][:, None] + 0.5 * noise, "float32")


@pytest.mark.parametrize(
    ("method", "width", "heads", "seq"),
    [
        ("anil", D_MODEL, 1, SEQ),
        *(
            pytest.param(method, 512, 8, 64, marks=pytest.mark.slow)
            for method in ("maml", "anil", "ridge")
        ),
    ],
)
def test_a_new_category_from_five_examples(method, width, heads, seq):
    options = {"adaptation_steps": 10, "method": method}
    if width == D_MODEL:
        meta_layer = layer_of(**options)
    else:
        make = quick(lambda key: MetaLA(width, heads, 2, key=key, **options))
        meta_layer = eqx.nn.inference_mode(make(jax.random.key(0)))
    support_labels = np.array([0, 0, 1, 1, 1])
    query_labels = np.arange(20) % 2
    predictions = logits_of(
        meta_layer,
        in_categories(support_labels, seq, width, 0),
        jnp.asarray(support_labels, "int32"),
        in_categories(query_labels, seq, width, 1),
    )
    assert predictions.shape == (20, 2)
    assert np.mean(np.argmax(predictions, axis=-1) == query_labels) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maml", "anil", "ridge"])
def test_sixteen_examples_of_the_width_of_a_language_model(method):
    """The shapes and the ones of the document: what it says to learn is learned."""
    make = quick(lambda key: MetaLA(768, 12, 10, method=method, key=key))
    meta_layer = eqx.nn.inference_mode(make(jax.random.key(0)))
    assert meta_layer.adaptation_steps == 5
    x = jnp.ones((8, 512, 768))
    assert quick(lambda layer, x: layer(x))(meta_layer, x).shape == (8, 512, 768)
    adapted_output = logits_of(
        meta_layer,
        jnp.ones((16, 128, 768)),
        jnp.ones((16, 128, 10)),
        jnp.ones((4, 128, 768)),
    )
    assert adapted_output.shape == (4, 128, 10)
    # Features alike, and the 1 of the bias, have curvature 2: one step at 1/2 is there.
    assert_close(adapted_output, np.ones((4, 128, 10)), dtype="float32", length=2000)
