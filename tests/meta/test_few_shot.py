"""Classifiers on embeddings of a few examples, against loops in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import check_gradient
from support.tolerances import assert_close

from capibara_eqx.meta import (
    Task,
    WithRidge,
    meta_value_and_grad,
    protonet,
    prototype_logits,
    prototypes,
    r2d2,
)


CLASSES, D_IN, D = 3, 4, 5
LABELS = np.array([2, 0, 1, 0])
QUERY_LABELS = np.array([1, 1, 0, 2, 2])


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


POINT = {
    "encoder": 0.5 * draw(0, D_IN, D),
    "x": draw(1, len(LABELS), D_IN),
    "query": draw(2, len(QUERY_LABELS), D_IN),
}
RIDGE = {"log_lambda": np.array(-0.6), "scale": np.array(2.5), "bias": np.array(0.4)}


def means(x, labels):
    return np.stack([x[labels == k].mean(axis=0) for k in range(CLASSES)])


def distances(x, centres):
    return np.array([[-np.sum((row - c) ** 2) for c in centres] for row in x])


def mean_surprise(logits, labels):
    found = 0.0
    for row, label in zip(logits, labels, strict=True):
        found += np.log(np.sum(np.exp(row - row[label])))
    return found / len(labels)


def protonet_oracle(p):
    support, query = np.tanh(p["x"] @ p["encoder"]), np.tanh(p["query"] @ p["encoder"])
    return float(mean_surprise(distances(query, means(support, LABELS)), QUERY_LABELS))


def r2d2_oracle(p):
    support, query = np.tanh(p["x"] @ p["encoder"]), np.tanh(p["query"] @ p["encoder"])
    gram = support.T @ support + np.exp(p["log_lambda"]) * np.eye(D)
    weights = np.linalg.solve(gram, support.T @ np.eye(CLASSES)[LABELS])
    return float(mean_surprise(p["scale"] * query @ weights + p["bias"], QUERY_LABELS))


def encode(encoder, x, *, key=None):
    return jnp.tanh(x @ encoder)


def as_task(arrays):
    return Task(
        support=(arrays["x"], jnp.asarray(LABELS)),
        query=(arrays["query"], jnp.asarray(QUERY_LABELS)),
    )


def test_the_loss_of_prototypes_and_its_gradients():
    task_loss = protonet(encode, num_classes=CLASSES)
    check_gradient(
        lambda arrays: task_loss(arrays["encoder"], as_task(arrays)),
        protonet_oracle,
        POINT,
    )


def test_the_loss_of_ridge_regression_and_its_gradients():
    task_loss = r2d2(encode, num_classes=CLASSES)

    def value(arrays):
        learned = (arrays[name] for name in ("encoder", *RIDGE))
        return task_loss(WithRidge(*learned), as_task(arrays))

    check_gradient(value, r2d2_oracle, POINT | RIDGE)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_prototypes_of_a_batch(batch):
    x, query = draw(3, *batch, 6, D), draw(4, *batch, 2, D)
    labels = np.random.default_rng(5).permuted(
        np.broadcast_to([0, 1, 2, 1, 1, 0], (*batch, 6)), axis=-1
    )

    @jax.jit
    def run(x, labels, query):
        centres = prototypes(x, labels, CLASSES)
        return centres, prototype_logits(query, centres)

    x, query = x.astype("float32"), query.astype("float32")
    centres, logits = run(*map(jnp.asarray, (x, labels, query)))
    for at in np.ndindex(*batch):
        want = means(x[at], labels[at])
        assert_close(centres[at], want, dtype="float32", length=6)
        want = distances(query[at], want)
        assert_close(logits[at], want, dtype="float32", length=D, factor=16)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (2,)])
def test_ridge_logits_of_a_batch(batch):
    x, query = draw(6, *batch, 4, D), draw(7, *batch, 2, D)
    labels = np.broadcast_to(LABELS, (*batch, 4))
    learner = WithRidge.init(None, strength=0.5, scale=3.0)
    found = eqx.filter_jit(learner.classify)(
        jnp.asarray(x, "float32"),
        jnp.asarray(labels),
        jnp.asarray(query, "bfloat16"),
        num_classes=CLASSES,
    )
    rounded = np.asarray(jnp.asarray(query, "bfloat16"), "float64")
    for at in np.ndindex(*batch):
        gram = x[at].T @ x[at] + 0.5 * np.eye(D)
        weights = np.linalg.solve(gram, x[at].T @ np.eye(CLASSES)[LABELS])
        want = 3 * rounded[at] @ weights
        assert_close(found[at], want, dtype="float32", length=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["protonet", "r2d2"])
def test_tasks_are_a_batch_and_dropout_gets_keys(name, getkey):
    """The mean over tasks of what each is alone, with a key for every embedding."""

    class Encoder(eqx.Module):
        weight: jax.Array
        dropout: eqx.nn.Dropout

        def __call__(self, x, *, key):
            return self.dropout(x @ self.weight, key=key)

    encoder = Encoder(jnp.asarray(POINT["encoder"], "float32"), eqx.nn.Dropout(0.3))
    run = lambda model, x, *, key: model(x, key=key)
    if name == "protonet":
        learner, task_loss = encoder, protonet(run, num_classes=CLASSES)
    else:
        learner, task_loss = WithRidge.init(encoder), r2d2(run, num_classes=CLASSES)
    part = lambda seed, labels: (
        jnp.asarray(draw(seed, 2, len(labels), D_IN), "float32"),
        jnp.asarray([labels] * 2),
    )
    tasks = Task(support=part(8, LABELS), query=part(9, QUERY_LABELS))
    key = getkey()
    value, gradients = eqx.filter_jit(
        lambda learner: meta_value_and_grad(task_loss, tasks, key=key)(learner)
    )(learner)
    alone = eqx.filter_jit(task_loss)
    each = [
        alone(learner, jax.tree.map(lambda x, at=at: x[at], tasks), key=task_key)
        for at, task_key in enumerate(jax.random.split(key, 2))
    ]
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-5)
    weight = gradients.weight if name == "protonet" else gradients.model.weight
    assert np.all(np.isfinite(weight))
    assert np.any(weight)
