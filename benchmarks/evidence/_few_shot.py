"""Methods that learn to tell a few classes apart from a few examples of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from capibara_eqx.layers import Linear
from capibara_eqx.meta import (
    Task,
    WithRates,
    WithRidge,
    adapt,
    meta_sgd,
    only,
    protonet,
    prototype_logits,
    prototypes,
    r2d2,
    ridge_head,
    sgd,
)
from capibara_eqx.meta.tasks import ClassPool, sample_episodes

from ._meta_training import margin
from ._models import he_linear


# Tasks that are judged at a time: many images in each.
_AT_A_TIME = 20


@dataclass(frozen=True)
class Episodes:
    """A task has `shots` examples of each of `ways` classes, and `queries` more."""

    ways: int = 5
    shots: int = 1
    queries: int = 15

    def sample(self, key: PRNGKeyArray, num_tasks: int, pool: ClassPool) -> Task:
        """Tasks on a leading axis."""
        sizes = {"ways": self.ways, "shots": self.shots, "queries": self.queries}
        return sample_episodes(key, num_tasks, pool, **sizes)


@dataclass(frozen=True)
class Inner:
    """Steps of the inner loops, and what their learned rates begin with."""

    steps: int
    rate: float


class Classifier(eqx.Module):
    """A linear map of what a body makes of examples."""

    body: PyTree
    head: Linear

    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n classes"]:
        return self.head(jax.nn.relu(self.body(x)))


class Method(NamedTuple):
    """What is learned, by which loss of a task, and what it then says of a task."""

    learner: PyTree
    task_loss: Callable[..., Any]
    logits: Callable[[PyTree, Task], Float[Array, "q classes"]]


def make_method(
    name: str,
    body: PyTree,
    features: int,
    episodes: Episodes,
    inner: Inner,
    *,
    key: PRNGKeyArray,
) -> Method:
    """One of `METHODS`.

    **Arguments:**

    - `name`: of the method.
    - `body`: makes `(n, features)` of `n` examples.
    - `features`: how many.
    - `episodes`, `inner`: what tasks and inner loops are like.
    - `key`: for the head, if the method learns one.
    """
    if name in ("R2-D2", "ProtoNet"):
        return {"R2-D2": _ridge, "ProtoNet": _prototypes}[name](body, episodes.ways)
    head = he_linear(features, episodes.ways, key=key)
    classifier = Classifier(body, head)
    where = {
        "MAML": eqx.is_inexact_array,
        "ANIL": only(classifier, lambda model: model.head),
    }[name]
    return _descent(classifier, where, inner)


METHODS = ("R2-D2", "MAML", "ANIL", "ProtoNet")


def _ridge(body: PyTree, ways: int) -> Method:
    def logits(learner, task):
        (x, labels), (query, _) = task.support, task.query
        support, query = learner.model(x), learner.model(query)
        return learner.classify(support, labels, query, num_classes=ways)

    # Ridge regression to one-hot labels says values near 0 and 1, no logits.
    learner = WithRidge.init(body, scale=10.0)
    return Method(learner, r2d2(lambda body, x: body(x), num_classes=ways), logits)


def _prototypes(body: PyTree, ways: int) -> Method:
    def logits(body, task):
        (x, labels), (query, _) = task.support, task.query
        return prototype_logits(body(query), prototypes(body(x), labels, ways))

    return Method(body, protonet(lambda body, x: body(x), num_classes=ways), logits)


def _descent(classifier: Classifier, where: Any, inner: Inner) -> Method:
    how = {"steps": inner.steps, "where": where}

    def logits(learner, task):
        model = adapt(
            *(_loss, learner.model, task.support),
            **{"optimizer": sgd(learner.rates), **how},
        )
        return model(task.query[0])

    learner = WithRates.init(classifier, inner.rate, where=where, per="leaf")
    return Method(learner, meta_sgd(_loss, **how), logits)


def _loss(model: Classifier, batch: tuple[Array, Array]) -> Float[Array, ""]:
    x, labels = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
    return losses.mean()


def judge(
    logits: Callable[[Task], Array],
    pool: ClassPool,
    episodes: Episodes,
    keys: PRNGKeyArray,
) -> Float[Array, " tasks"]:
    """The share of the queries of each task that are told right, one task a key."""

    def one(key):
        tasks = episodes.sample(key, 1, pool)
        task = jax.tree.map(lambda leaf: leaf[0], tasks)
        right = logits(task).argmax(-1) == task.query[1]
        return right.mean(dtype=jnp.float32)

    return jax.lax.map(one, keys, batch_size=min(_AT_A_TIME, len(keys)))


def found_of(shares: Array) -> dict[str, float]:
    """Mean and margin of shares of tasks."""
    wide = np.asarray(shares, np.float64)
    return {"accuracy": float(wide.mean()), "margin": margin(wide)}


def _flat(task: Task, ways: int) -> tuple[Array, Array, Array]:
    """Pixels of the support and of the query, and one-hot labels of the support."""
    (x, labels), (query, _) = task.support, task.query
    rows = [images.reshape(len(images), -1) for images in (x, query)]
    return rows[0], rows[1], jax.nn.one_hot(labels, ways)


def _most_alike(alike: Array, members: Array) -> Array:
    """`alike (q, n)` to each example; the most of each class."""
    members = members.astype(bool)
    return jnp.where(members[None], alike[..., None], -jnp.inf).max(axis=1)


def nearest_pixels(task: Task, ways: int) -> Float[Array, "q classes"]:
    """The nearest example in the Euclidean distance."""
    x, query, members = _flat(task, ways)
    distances = jnp.sum((query[:, None] - x[None]) ** 2, axis=-1)
    return _most_alike(-distances, members)


def cosine_pixels(task: Task, ways: int) -> Float[Array, "q classes"]:
    """The example at the smallest angle."""
    x, query, members = _flat(task, ways)
    x, query = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (x, query))
    return _most_alike(query @ x.T, members)


def prototype_pixels(task: Task, ways: int) -> Float[Array, "q classes"]:
    """The nearest mean of a class."""
    x, query, _ = _flat(task, ways)
    return prototype_logits(query, prototypes(x, task.support[1], ways))


def ridge_pixels(task: Task, ways: int) -> Float[Array, "q classes"]:
    """Ridge regression to one-hot labels, of strength 1."""
    x, query, members = _flat(task, ways)
    return query @ ridge_head(x, members, 0.0)


def judge_pixels(
    baselines: dict[str, Callable[[Task, int], Array]],
    pool: ClassPool,
    episodes: Episodes,
    keys: PRNGKeyArray,
) -> dict[str, dict[str, float]]:
    """What each baseline finds of the same tasks."""

    @eqx.filter_jit
    def shares(logits, pool, keys):
        return judge(lambda task: logits(task, episodes.ways), pool, episodes, keys)

    return {
        name: found_of(shares(logits, pool, keys)) for name, logits in baselines.items()
    }


def mean_of(found: Sequence[dict[str, float]]) -> str:
    """Accuracies of seeds in percent: the mean, and the largest margin."""
    mean = np.mean([f["accuracy"] for f in found])
    return f"{100 * mean:.1f} ± {100 * max(f['margin'] for f in found):.1f}"
