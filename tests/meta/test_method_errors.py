"""Bad arguments of the methods: the message names the argument and says what to do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused

from capibara_eqx.meta import (
    Task,
    WithContext,
    WithRidge,
    cavia,
    imaml,
    implicit_adapt,
    maml,
    meta_sgd,
    only,
    protonet,
    prototype_logits,
    prototypes,
    r2d2,
    reptile,
    ridge_head,
    sgd,
)


pytestmark = pytest.mark.errors


def loss(model, batch, *, key=None):
    return jnp.mean((batch @ model) ** 2)


MODEL, BATCH = jnp.ones(3), jnp.ones((2, 3))
EMPTY = jnp.ones((0, 3))
INNER: dict[str, Any] = {"optimizer": sgd(0.1), "steps": 1}
IMPLICIT: dict[str, Any] = INNER | {"strength": 1.0}


def encode(model, x, *, key=None):
    return x


def labelled(labels=(0, 1), query_labels=(1, 0)):
    return Task(
        support=(BATCH, jnp.asarray(labels)), query=(BATCH, jnp.asarray(query_labels))
    )


def test_empty_support_or_query():
    nothing, unseen = Task(EMPTY, BATCH), Task(BATCH, EMPTY)
    for method in (reptile(loss, **INNER), imaml(loss, **IMPLICIT)):
        with refused("`support` must hold at least one example", "(0, 3)"):
            method(MODEL, nothing)
    with refused("imaml: `query` must hold at least one example"):
        imaml(loss, **IMPLICIT)(MODEL, unseen)
    none = jnp.zeros(0, "int32")
    for method, learner in (
        (protonet(encode, num_classes=2), None),
        (r2d2(encode, num_classes=2), WithRidge.init(None)),
    ):
        for name in ("support", "query"):
            task = eqx.tree_at(
                lambda task, name=name: getattr(task, name), labelled(), (EMPTY, none)
            )
            with refused(f"`{name}` must hold at least one example"):
                method(learner, task)
    with refused("prototypes: `x` must hold"):
        prototypes(EMPTY, none, 2)
    with refused("ridge_head: `x` must hold"):
        ridge_head(EMPTY, EMPTY, 0.0)
    with refused("WithRidge: `support` must hold"):
        WithRidge.init(None).classify(EMPTY, none, BATCH, num_classes=2)


def test_where_and_steps():
    nothing = lambda leaf: False
    with refused("reptile: `where` must choose", "The model has a"):
        reptile(loss, **INNER, where=nothing)({"a": MODEL}, Task(BATCH, None))
    with refused("implicit_adapt: `where` must choose", "The model has a"):
        imaml(loss, **IMPLICIT, where=nothing)({"a": MODEL}, Task(BATCH, BATCH))
    with refused("`steps` must be a whole number, 0 or more, got -1"):
        reptile(loss, optimizer=sgd(0.1), steps=-1)(MODEL, Task(BATCH, None))
    with refused("implicit_adapt: `steps`", "got -2"):
        imaml(loss, strength=1.0, optimizer=sgd(0.1), steps=-2)(
            MODEL, Task(BATCH, BATCH)
        )
    with refused("implicit_adapt: `where` must choose real arrays", "complex64"):
        implicit_adapt(loss, MODEL.astype("complex64"), BATCH, **IMPLICIT)


@pytest.mark.parametrize("strength", [0, -1.0, float("nan"), "1"])
def test_strength(strength):
    with refused("`strength` must be"):
        implicit_adapt(loss, MODEL, BATCH, **INNER, strength=strength)


def test_other_arguments_of_implicit_gradients():
    with refused("`strength` must be one number", "(2,)"):
        implicit_adapt(loss, MODEL, BATCH, **INNER, strength=jnp.ones(2))
    with refused("`cg_steps` must be a positive integer, got 0"):
        implicit_adapt(loss, MODEL, BATCH, **IMPLICIT, cg_steps=0)
    with refused("`cg_tolerance` must be positive", "1e-5"):
        implicit_adapt(loss, MODEL, BATCH, **IMPLICIT, cg_tolerance=0)
    with refused("implicit_adapt: `loss` must return one real number"):
        implicit_adapt(lambda model, batch: batch @ model, MODEL, BATCH, **IMPLICIT)


def test_a_learner_without_context():
    task = Task(BATCH, BATCH)
    with refused("cavia: the learner must have a `context`", "WithContext.init"):
        cavia(loss, **INNER)(MODEL, task)
    with refused("`d_context` must be a positive integer, got 0"):
        WithContext.init(None, 0)


def test_shapes_of_ridge_regression():
    for x, y in (
        (BATCH, jnp.ones(2)),
        (BATCH, jnp.ones((3, 1))),
        (jnp.ones(3), jnp.ones(3)),
        (BATCH[None], BATCH),
    ):
        with refused("ridge_head: `x` and `y` must be", str(x.shape), str(y.shape)):
            ridge_head(x, y, 0.0)
    with refused("`log_lambda` must be one number", "(2,)"):
        ridge_head(BATCH, BATCH, jnp.zeros(2))
    for name in ("strength", "scale"):
        with refused(f"`{name}` must be positive"):
            WithRidge.init(None, **{name: 0.0})


@pytest.mark.parametrize("jitted", [False, True])
def test_ridge_regression_without_a_solution(jitted):
    """Two equal examples and no penalty to speak of; what is not finite."""
    solve = jax.jit(ridge_head) if jitted else ridge_head
    for x, y, log_lambda in (
        (BATCH, BATCH, jnp.asarray(-200.0)),
        (BATCH, BATCH, jnp.asarray(jnp.nan)),
        (BATCH.at[0, 0].set(jnp.inf), BATCH, jnp.asarray(0.0)),
    ):
        with pytest.raises(RuntimeError, match="ridge_head: there is no solution"):
            solve(x, y, log_lambda)


def test_labels_of_another_shape_or_kind():
    with refused("prototypes: `labels` must have one label", "(2,)", "(2, 2)"):
        prototypes(BATCH, jnp.zeros((2, 2), "int32"), 2)
    with refused("prototypes: `labels` must be of integers", "float32"):
        prototypes(BATCH, jnp.zeros(2), 2)
    with refused("`num_classes` must be a positive integer, got 0"):
        prototypes(BATCH, jnp.zeros(2, "int32"), 0)
    with refused("protonet: `query[1]` must have one label", "(2,)", "(3,)"):
        protonet(encode, num_classes=2)(None, labelled(query_labels=(0, 1, 0)))
    with refused("`num_classes` must be a positive integer"):
        r2d2(encode, num_classes=0)
    with refused("prototype_logits: `x` must have 4 elements on its last axis"):
        prototype_logits(BATCH, jnp.ones((2, 4)))


def test_what_encode_returns():
    for made, what in ((jnp.ones((2, 3, 1)), "(2, 3, 1)"), (jnp.arange(2), "int32")):
        with refused("protonet: `encode` must return one vector", what, "jax.vmap"):
            protonet(lambda model, x, made=made: made, num_classes=2)(None, labelled())
    with refused("r2d2: `encode` must return one vector", "list"):
        r2d2(lambda model, x: [x], num_classes=2)(WithRidge.init(None), labelled())
    with refused("protonet: `support` must be a pair (x, labels)", "Task(support="):
        protonet(encode, num_classes=2)(None, Task(BATCH, BATCH))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_labels_out_of_range(wrong):
    with pytest.raises(
        RuntimeError, match=r"`labels` must lie between 0 and 1\..*num_"
    ):
        prototypes(BATCH, jnp.asarray([0, wrong]), 2)


@pytest.mark.slow
def test_labels_out_of_range_in_tasks_inside_of_jit():
    run = eqx.filter_jit(protonet(encode, num_classes=2))
    with pytest.raises(
        RuntimeError, match=r"protonet: `support\[1\]` must lie between"
    ):
        run(None, labelled(labels=(0, 2)))
    run = eqx.filter_jit(r2d2(encode, num_classes=2))
    with pytest.raises(RuntimeError, match=r"r2d2: `query\[1\]` must lie between"):
        run(WithRidge.init(None), labelled(query_labels=(-1, 0)))


@pytest.mark.slow
def test_a_class_without_an_example():
    run = jax.jit(lambda labels: prototypes(BATCH, labels, 3))
    with pytest.raises(RuntimeError, match=r"class 1 of 3 has none"):
        run(jnp.asarray([0, 2]))


@pytest.mark.slow
def test_an_inner_loss_that_is_not_finite():
    run = jax.jit(lambda model: implicit_adapt(loss, model, BATCH, **IMPLICIT))
    with pytest.raises(RuntimeError, match="implicit_adapt: the inner loss is not"):
        run(jnp.full(3, jnp.inf))


def outer_gradient(curvature, tolerance):
    def curved(model, batch, *, key=None):
        return model @ batch @ model / 2

    def after(model):
        inner: Any = {"strength": 1.0, "optimizer": sgd(1e-3), "steps": 1}
        adapted = implicit_adapt(
            curved, model, curvature, **inner, cg_tolerance=tolerance
        )
        return jnp.sum(adapted)

    return jax.jit(jax.grad(after))(jnp.ones(len(curvature)))


@pytest.mark.slow
def test_conjugate_gradients_that_do_not_arrive():
    """A tolerance that float32 never reaches; a system that has no solution."""
    roots = jnp.asarray(np.random.default_rng(0).standard_normal((30, 40)), "float32")
    with pytest.raises(RuntimeError, match="conjugate gradients did not solve"):
        outer_gradient(roots @ roots.T, 1e-30)
    # I + H / strength is zero along the first coordinate.
    with pytest.raises(RuntimeError, match="`strength` too small for the curvature"):
        outer_gradient(jnp.diag(jnp.asarray([-1.0, 1.0, 2.0])), 1e-5)


def test_a_part_that_holds_nothing():
    learner = WithContext(MODEL, jnp.ones(2, "int32"))
    with refused("only: `part` must choose at least one floating point array"):
        cavia(loss, **INNER)(learner, Task(BATCH, BATCH))
    assert only({"a": MODEL}, lambda model: model["a"]) == {"a": True}


def test_a_learned_strength_that_is_not_positive():
    for strength in (-0.5, 0.0):
        with pytest.raises(Exception, match="`strength` must be positive"):
            implicit_adapt(loss, MODEL, BATCH, **INNER, strength=jnp.asarray(strength))


def test_numbers_that_are_whole_where_real_ones_are_due():
    whole = jnp.ones((2, 3), "int32")
    with refused("ridge_head: `x` must be floating point, got int32"):
        ridge_head(whole, BATCH, 0.0)
    with refused("ridge_head: `y` must be floating point, got int32"):
        ridge_head(BATCH, whole, 0.0)
    with refused("prototypes: `x` must be floating point, got int32"):
        prototypes(whole, jnp.arange(2), 2)
    with refused("WithContext: `x` must be floating point, got int32"):
        WithContext.init(lambda x: x, 2)(whole)


def test_what_is_to_be_classified():
    learner, labels = WithRidge.init(None), jnp.arange(2)
    with refused("WithRidge: `query` must hold at least one example"):
        learner.classify(BATCH, labels, EMPTY, num_classes=2)
    with refused("WithRidge: `query` must have 3 elements", "(2, 4)"):
        learner.classify(BATCH, labels, jnp.ones((2, 4)), num_classes=2)
    with refused("WithRidge: `query` must be (*batch, q, d)", "(1, 2, 3)"):
        learner.classify(BATCH, labels, BATCH[None], num_classes=2)
    for centres in (jnp.ones(3), jnp.ones((2, 2, 3))):
        with refused("prototype_logits: `x` and `centres` must be", str(centres.shape)):
            prototype_logits(BATCH, centres)


def test_a_learner_or_a_task_of_another_kind():
    with refused("meta_sgd: the learner must be a WithRates", "WithRates.init"):
        meta_sgd(loss, steps=1)(MODEL, Task(BATCH, BATCH))
    with refused("r2d2: the learner must be a WithRidge", "WithRidge.init"):
        r2d2(encode, num_classes=2)(None, labelled())
    for method in (maml(loss, **INNER), imaml(loss, **IMPLICIT)):
        with refused("the task must be a Task, got tuple", "Task(support, query)"):
            method(MODEL, (BATCH, BATCH))
    with refused("protonet: the task must be a Task"):
        protonet(encode, num_classes=2)(None, (BATCH, BATCH))
