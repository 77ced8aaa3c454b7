"""Bad arguments of inner loops: the message says what to do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.messages import refused

from capibara_eqx.meta import (
    Task,
    WithRates,
    adapt,
    adapt_trajectory,
    init_meta_state,
    make_meta_step,
    maml,
    meta_sgd,
    meta_value_and_grad,
    multi_step_weights,
    only,
    rates_like,
    safe_adam,
    sgd,
)


pytestmark = pytest.mark.errors
MODEL = {"head": {"bias": jnp.zeros(2), "weight": jnp.ones((2, 3))}, "count": 3}
SUPPORT = (jnp.ones((4, 3)), jnp.ones((4, 2)))
EMPTY = (jnp.ones((0, 3)), jnp.ones((0, 2)))
HOW: dict[str, Any] = {"optimizer": sgd(0.1), "steps": 2}


def loss(model, batch, *, key=None):
    x, y = batch
    head = model["head"]
    return jnp.mean((x @ head["weight"].T + head["bias"][None] - y) ** 2)


def test_nothing_to_learn_from_or_to_be_judged_by():
    with refused("adapt: `support[0]`", "(0, 3)", "at least one example"):
        adapt(loss, MODEL, EMPTY, **HOW)
    with refused("adapt_trajectory: `support[0]`"):
        adapt_trajectory(loss, MODEL, EMPTY, **HOW)
    with refused("maml: `query[0]`", "(0, 3)"):
        maml(loss, **HOW)(MODEL, Task(SUPPORT, EMPTY))
    with refused("adapt: `support[0]`"):
        maml(loss, **HOW)(MODEL, Task(EMPTY, SUPPORT))


@pytest.mark.parametrize("function", [adapt, adapt_trajectory])
def test_steps(function):
    for steps in (-1, 1.5, True, jnp.asarray(2)):
        with refused(f"{function.__name__}: `steps`", "0 or more"):
            function(loss, MODEL, SUPPORT, optimizer=sgd(0.1), steps=steps)


def test_how_to_adapt():
    with refused("`remat`", "'step', 'nested'", "'nested'?"):
        adapt(loss, MODEL, SUPPORT, **HOW, remat="neste")
    flag: Any = 1
    with refused("`first_order`", "True or False"):
        adapt(loss, MODEL, SUPPORT, **HOW, first_order=flag)
    optimizer: Any
    for optimizer in (0.1, optax.sgd, None):
        with refused("adapt: `optimizer`", "GradientTransformation", "meta.sgd(0.1)"):
            adapt(loss, MODEL, SUPPORT, optimizer=optimizer, steps=1)
    for function in (make_meta_step, lambda o, _: init_meta_state(MODEL, o)):
        with refused("_meta_st", "`optimizer`", "GradientTransformation"):
            function(optimizer, maml(loss, **HOW))


def test_where_chooses_nothing():
    names = ("head/bias, head/weight", "chooses none")
    with refused("adapt: `where`", *names):
        adapt(loss, MODEL, SUPPORT, **HOW, where=lambda leaf: False)
    with refused("adapt: `where`", *names):
        nothing = jax.tree.map(lambda _: False, MODEL)
        adapt(loss, MODEL, SUPPORT, **HOW, where=nothing)
    with refused("only: `part`", *names):
        only(MODEL, lambda model: model["count"])
    with refused("rates_like: `where`", *names):
        rates_like(MODEL, 0.1, where=lambda leaf: False)
    with refused("meta_value_and_grad: `where`", *names):
        outer = meta_value_and_grad(loss, SUPPORT, where=lambda leaf: False)
        outer(MODEL)
    with refused("init_meta_state: `where`", *names):
        init_meta_state(MODEL, optax.sgd(0.1), where=lambda leaf: False)
    many = [jnp.zeros(1)] * 20
    with refused("0, 1, 2", "11 and 8 more"):
        adapt(loss, many, SUPPORT, **HOW, where=lambda leaf: False)
    with refused("The model has none"):
        adapt(loss, {"count": 3}, SUPPORT, **HOW)


def test_where_of_another_structure():
    for where in ([True], {"tail": True}, {"head": [True, False], "count": False}):
        with refused("adapt: `where`", "begins like the model", "meta.only"):
            adapt(loss, MODEL, SUPPORT, **HOW, where=where)
    with refused("adapt: `where`", "booleans", "meta.only"):
        adapt(loss, MODEL, SUPPORT, **HOW, where={"head": 1, "count": 0})


def test_losses_that_are_not_one_real_number():
    def returns(what):
        return lambda model, batch: what

    cases: dict[str, Any] = {
        "float32 of shape (4,)": jnp.ones(4),
        "int32 of shape ()": jnp.asarray(1),
        "complex64 of shape ()": jnp.asarray(1j),
        "tuple": (jnp.ones(()), {}),
        "float": 1.0,
        "NoneType": None,
    }
    for what, value in cases.items():
        with refused("adapt: `loss`", "one real number", what, "mean"):
            adapt(returns(value), MODEL, SUPPORT, **HOW)
        with refused("meta_value_and_grad: `loss`", "one real number"):
            meta_value_and_grad(returns(value), SUPPORT)(MODEL)
    with refused("meta_value_and_grad: `loss`", "(loss, aux)", "has_aux=True"):
        meta_value_and_grad(returns(jnp.ones(())), SUPPORT, has_aux=True)(MODEL)
    with refused("maml: `loss`", "(4,)"):
        task = Task(SUPPORT, jnp.ones(4))
        query_only = lambda model, batch: (
            batch if isinstance(batch, jax.Array) else loss(model, batch)
        )
        maml(query_only, **HOW)(MODEL, task)


def test_tasks():
    ones = jnp.ones
    with refused("`tasks`", "at least one task", "no array"):
        meta_value_and_grad(loss, ())
    with refused("`tasks`", "at least one task", "(0, 4)"):
        meta_value_and_grad(loss, (ones((0, 4)), ones((0, 4))))
    with refused("one leading axis", "(2, 4)", "(3, 4)", "jnp.stack"):
        meta_value_and_grad(loss, (ones((2, 4)), ones((3, 4))))
    with refused("one leading axis", "()"):
        meta_value_and_grad(loss, (ones((2, 4)), ones(())))
    with refused("`tasks[1]`", "float", "arrays and nothing else", "the loss"):
        meta_value_and_grad(loss, (ones((2, 4)), 0.5))


def test_states_of_another_outer_loop():
    adam, head = optax.adam(1e-3), only(MODEL, lambda model: model["head"]["bias"])
    tasks = jax.tree.map(lambda leaf: leaf[None], Task(SUPPORT, SUPPORT))
    step = make_meta_step(adam, maml(loss, **HOW))
    for state in (
        init_meta_state(MODEL, adam, where=head),
        init_meta_state(MODEL, optax.sgd(1e-3)),
    ):
        with refused("make_meta_step: the `opt_state` of `state`", "`where`", "same"):
            step(state, tasks)
    with refused("make_meta_step: `state` must be a MetaState, got dict", "init_meta"):
        step(MODEL, tasks)


def test_a_where_that_fails_on_a_leaf():
    with refused("adapt: `where`", "shape (2,)", "'layers'", "meta.only"):
        where = lambda model: model.layers[-1]
        adapt(loss, MODEL, SUPPORT, **HOW, where=where)


def test_what_makes_no_optimizer_of_rates():
    made: Any = sgd(0.1)
    for wrong, what in ((made, "GradientTransformation"), (optax.adam, "adam")):
        with refused("meta_sgd: `optimizer`", f"got {what}", "`meta.sgd`"):
            meta_sgd(loss, steps=1, optimizer=wrong)


def test_rates_that_are_no_numbers():
    for wrong, what in (
        (optax.constant_schedule(0.1), "a function"),
        ("0.1", "'0.1'"),
        (True, "True"),
        (jnp.ones(2, "int32"), "an array of int32"),
    ):
        with refused("sgd: `rates` must be a number", what, "per_step=True"):
            sgd(wrong)
    with refused("sgd: `rates` of 'head/bias' must be a number", "'a'"):
        sgd({"head": {"bias": "a", "weight": 0.1}})
    values: list[Any] = ["a", True, None]
    for wrong in values:
        with refused("`rate` must be a number"):
            rates_like(MODEL, wrong)


def test_rates_of_a_model_of_another_width():
    """Whose sizes are part of its nodes; the shapes say what is wrong."""
    wide, narrow = (eqx.nn.Linear(3, width, key=jax.random.key(0)) for width in (4, 2))
    rates = rates_like(wide, 0.1, per="element")
    fit = lambda model, batch, *, key=None: jnp.sum(jax.vmap(model)(batch[0]) ** 2)
    with refused("'weight'", "(2, 3)", "(4, 3)"):
        adapt(fit, narrow, SUPPORT, optimizer=sgd(rates), steps=1)


def test_rates_that_do_not_fit():
    rates = rates_like(MODEL, 0.1)
    head = rates["head"]

    def of(rates, **options):
        adapt(loss, MODEL, SUPPORT, optimizer=sgd(rates, **options), steps=1)

    with refused("sgd: `rates`", "no rate for 'head/bias'", "`meta.rates_like`"):
        of({"head": {"weight": head["weight"]}, "count": None})
    with refused("sgd: `rates`", "a rate for 'tail'"):
        of({**rates, "tail": head["bias"]})
    with refused("sgd: `rates`", "the same names", "of this model"):
        of({"head": head})
    with refused("no rate for 'head/bias', 'head/weight' and a rate for '0', '1'"):
        of([head["weight"], head["weight"]])
    with refused("'head/weight'", "(2, 3)", "(3, 2)"):
        wide = jnp.ones((3, 2))
        of(eqx.tree_at(lambda r: r["head"]["weight"], rates, wide))
    with refused("'head/bias'", "got shape (5,)", "per_step=True"):
        of(rates_like(MODEL, 0.1, steps=5))
    with refused("leading axis", "got shape ()", "per_step=False"):
        of(rates, per_step=True)
    with refused("leading axis", "got shape (0,)"):
        of(jnp.zeros(0), per_step=True)
    with refused("'head/bias'", "(2,)", "(7,) after the axis of steps"):
        of(jnp.zeros((5, 7)), per_step=True)
    # Made for all of the model, where only a part of it adapts.
    with refused("a rate for 'head/bias'", "the `where` that `adapt` gets"):
        weight = only(MODEL, lambda model: model["head"]["weight"])
        adapt(loss, MODEL, SUPPORT, optimizer=sgd(rates), steps=1, where=weight)
    with refused("a rate for", "'head/weight'"):
        bias = only(MODEL, lambda model: model["head"]["bias"])
        learner = WithRates.init(MODEL, 0.1)
        meta_sgd(loss, steps=1, where=bias)(learner, Task(SUPPORT, SUPPORT))


def test_other_arguments_of_rates_and_weights():
    with refused("`per`", "'leaf', 'element'", "'leaf'?"):
        rates_like(MODEL, 0.1, per="leave")
    with refused("`steps`", "positive"):
        rates_like(MODEL, 0.1, steps=0)
    flag: Any = 2
    with refused("`per_step`", "True or False"):
        sgd(0.1, per_step=flag)
    for eps_root in (0.0, -1.0):
        with refused("`eps_root`", "positive", "optax.adam"):
            safe_adam(0.1, eps_root=eps_root)
    with refused("`steps`", "positive"):
        multi_step_weights(0, 0.5)
    task = Task(SUPPORT, SUPPORT)
    with refused("maml: `step_weights`", "2 steps", "(3,)", "multi_step_weights(2"):
        maml(loss, **HOW, step_weights=jnp.ones(3))(MODEL, task)
    with refused("maml: `step_weights`", "`steps` is 0"):
        none = maml(loss, optimizer=sgd(0.1), steps=0, step_weights=jnp.ones(0))
        none(MODEL, task)


def explodes(p, batch):
    """Infinite from the value 32 on; each step of rate 1 doubles `p`."""
    return jnp.where(p < 32, -(p**2) / 2, jnp.inf) + 0 * batch


def after(p, batch):
    return jnp.sum(adapt(explodes, p, batch, optimizer=sgd(1.0), steps=9) ** 2)


RUNS = {
    "vmap of grad under jit": (
        lambda p, x: jnp.sum(jax.vmap(jax.grad(after), (0, None))(p, x)),
        jnp.asarray([1e-3, 8.0, 1e-3]),
    ),
    "plain": (after, jnp.asarray(8.0)),
    "grad": (jax.grad(after), jnp.asarray(8.0)),
    "path": (
        lambda p, x: adapt_trajectory(
            explodes, p, x, optimizer=sgd(1.0), steps=9, remat="nested"
        ),
        jnp.asarray(8.0),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if i else ()) for i, n in enumerate(RUNS)],
)
def test_a_loss_that_is_not_finite_is_reported_with_its_step(name):
    run, start = RUNS[name]
    # 8, 16, 32: infinite as the third step looks at it.
    with pytest.raises(RuntimeError, match="not finite at step 3 of 9") as caught:
        jax.block_until_ready(eqx.filter_jit(run)(start, jnp.ones(())))
    assert "rate too large" in str(caught.value)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_outside_of_jit():
    with pytest.raises(RuntimeError, match="adapt: .* at step 3 of 9"):
        after(jnp.asarray(8.0), jnp.ones(()))


def test_parameters_that_are_not_finite_after_the_last_step():
    """Of which no loss tells. What was not finite before may stay so."""

    def root(params, batch):
        return jnp.sum(jnp.sqrt(params) * batch)

    with pytest.raises(Exception, match="not finite after the last of 1 steps"):
        adapt(root, jnp.zeros(2), jnp.ones(2), optimizer=sgd(0.1), steps=1)

    def masked(params, batch):
        return jnp.sum(jnp.exp(params) * batch)

    start = jnp.array([0.0, -jnp.inf])
    found = adapt(masked, start, jnp.ones(2), optimizer=sgd(0.5), steps=1)
    np.testing.assert_array_equal(found, [-0.5, -np.inf])


def test_step_rates_of_different_lengths():
    """Such as rates an element, whose rows would pass for those of steps."""
    model = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 3))}
    rates = sgd(rates_like(model, 0.1, per="element"), per_step=True)
    with refused("leading axis of as many steps each", "'a': 3, 'b': 2", "rates_like"):
        rates.init(model)


def test_numbers_out_of_their_range():
    for wrong in ({"b1": 1.0}, {"b2": -0.1}, {"eps": -1.0}):
        arguments: dict[str, Any] = wrong
        with refused(f"`{next(iter(wrong))}` must"):
            safe_adam(0.1, **arguments)
    for progress in (-0.1, 1.5):
        with refused("`progress` must lie between 0 and 1"):
            multi_step_weights(5, progress)
    # As an array it is clipped, and a list of weights becomes one.
    np.testing.assert_allclose(multi_step_weights(2, jnp.asarray(-3.0)), [0.5, 0.5])
    task = Task(SUPPORT, SUPPORT)
    weights: Any = [0.5, 0.5]
    listed = maml(loss, **HOW, step_weights=weights)(MODEL, task)
    assert listed == maml(loss, **HOW, step_weights=jnp.full(2, 0.5))(MODEL, task)
