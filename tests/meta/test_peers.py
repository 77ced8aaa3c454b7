"""Outer gradients beside those of torch.func, higher and TorchOpt, in float64."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.derivatives import quick_jit
from support.precision import enable_x64

from capibara_eqx.meta import (
    Task,
    WithRates,
    adapt,
    maml,
    meta_sgd,
    meta_value_and_grad,
    safe_adam,
    sgd,
)


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch: Any = pytest.importorskip("torch", reason="needs the extra `peers`")

SIZES, TASKS, SHOTS, STEPS, RATE = (2, 5, 4, 3), 3, 6, 3, 0.2
NAMES = [f"{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")]


def problem() -> tuple[dict[str, np.ndarray], Task]:
    """Parameters by the names of a `torch.nn.Sequential`, and tasks."""
    rng = np.random.default_rng(1)
    params = {}
    for layer, (d_in, d_out) in enumerate(zip(SIZES[:-1], SIZES[1:], strict=True)):
        params[f"{2 * layer}.weight"] = rng.standard_normal((d_out, d_in)) / d_in**0.5
        params[f"{2 * layer}.bias"] = 0.1 * rng.standard_normal(d_out)
    x = rng.standard_normal((2, TASKS, SHOTS, SIZES[0]))
    y = rng.standard_normal((2, TASKS, SHOTS, SIZES[-1]))
    return params, Task((x[0], y[0]), (x[1], y[1]))


PARAMS, TASK = problem()


def rates_of(kind: str) -> dict[str, np.ndarray]:
    """Rates by the names of parameters, `(steps, ...)`, and of their own each."""
    rng = np.random.default_rng(2)
    shape = lambda p: p.shape if kind == "element" else ()
    return {n: rng.uniform(0.05, 0.3, (STEPS, *shape(p))) for n, p in PARAMS.items()}


def loss(params, batch, *, key=None):
    x, y = batch
    for layer in (0, 2, 4):
        x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"][None]
        x = jnp.tanh(x) if layer < 4 else x
    return jnp.mean((x - y) ** 2)


@functools.cache
def ours(optimizer: str, first_order: bool = False):
    """Mean loss, its gradient, and all adapted parameters."""
    with enable_x64(True):
        inner = sgd(RATE) if optimizer == "sgd" else safe_adam(RATE)
        how = {"optimizer": inner, "steps": STEPS, "first_order": first_order}

        def compute(params, tasks):
            outer = meta_value_and_grad(maml(loss, **how), tasks)(params)
            one = lambda support: adapt(loss, params, support, **how)
            return *outer, jax.vmap(one)(tasks.support)

        arrays = jax.tree.map(jnp.asarray, (PARAMS, TASK))
        return jax.tree.map(np.asarray, quick_jit(compute)(*arrays))


def network():
    linear = [
        torch.nn.Linear(*pair) for pair in zip(SIZES[:-1], SIZES[1:], strict=True)
    ]
    tanh = torch.nn.Tanh()
    net = torch.nn.Sequential(linear[0], tanh, linear[1], tanh, linear[2]).double()
    net.load_state_dict({name: torch.tensor(p) for name, p in PARAMS.items()})
    return net


def tensors(tree):
    return jax.tree.map(torch.tensor, tree)


def torch_loss(call, batch):
    x, y = batch
    return torch.mean((call(x) - y) ** 2)


def assert_same(got, want):
    """To 1e-10; what is compared is of order one."""
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for left, right in leaves:
        right = right.detach().numpy() if torch.is_tensor(right) else right
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


def by_torch_func(params, rates, first_order=False):
    """Mean loss and gradients at parameters and rates, and adapted parameters."""
    net = network()

    def adapted(params, rates, support):
        for k in range(STEPS):
            value = lambda params: torch_loss(
                lambda x: torch.func.functional_call(net, params, (x,)), support
            )
            grads = torch.func.grad(value)(params)
            if first_order:
                grads = {name: g.detach() for name, g in grads.items()}
            params = {n: p - rates[n][k] * grads[n] for n, p in params.items()}
        return params

    def after(params, rates, support, query):
        params = adapted(params, rates, support)
        call = lambda x: torch.func.functional_call(net, params, (x,))
        return torch_loss(call, query)

    def mean(params, rates):
        each = torch.func.vmap(after, (None, None, 0, 0))
        return each(params, rates, tensors(TASK.support), tensors(TASK.query)).mean()

    params, rates = tensors(params), tensors(rates)
    gradients, value = torch.func.grad_and_value(mean, (0, 1))(params, rates)
    one = torch.func.vmap(adapted, (None, None, 0))
    return value, *gradients, one(params, rates, tensors(TASK.support))


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_of_torch_func(first_order):
    rates = {name: np.full(STEPS, RATE) for name in NAMES}
    value, gradient, _, adapted = by_torch_func(PARAMS, rates, first_order)
    assert_same(ours("sgd", first_order), (value, gradient, adapted))


@pytest.mark.parametrize("kind", ["leaf", "element"])
@pytest.mark.parametrize("per_step", [False, True])
def test_learned_rates_of_torch_func(kind, per_step):
    rates = rates_of(kind)
    if not per_step:
        rates = {name: np.repeat(r[:1], STEPS, 0) for name, r in rates.items()}
    value, at_params, at_rates, _ = by_torch_func(PARAMS, rates)
    if not per_step:
        rates = {name: r[0] for name, r in rates.items()}
        at_rates = {name: r.sum(0) for name, r in at_rates.items()}
    with enable_x64(True):
        task_loss = meta_sgd(loss, steps=STEPS, per_step=per_step)
        learner = WithRates(*jax.tree.map(jnp.asarray, (PARAMS, rates)))
        tasks = jax.tree.map(jnp.asarray, TASK)
        outer = quick_jit(lambda l, t: meta_value_and_grad(task_loss, t)(l))
        got, gradient = jax.tree.map(np.asarray, outer(learner, tasks))
    assert_same((got, gradient.model, gradient.rates), (value, at_params, at_rates))


def task_by_task(adapt_one):
    """Mean loss and gradient, and adapted parameters, in a loop over tasks."""
    values, gradients, ends = [], [], []
    for i in range(TASKS):
        net = network()
        start = [dict(net.named_parameters())[name] for name in NAMES]
        support, query = (
            tuple(torch.tensor(part[i]) for part in batch)
            for batch in (TASK.support, TASK.query)
        )
        value, end = adapt_one(net, support, query)
        values.append(value.item())
        gradients.append([g.numpy() for g in torch.autograd.grad(value, start)])
        ends.append([end[name].detach().numpy() for name in NAMES])
    gradient = [np.mean(parts, 0) for parts in zip(*gradients, strict=True)]
    adapted = [np.stack(parts) for parts in zip(*ends, strict=True)]
    in_order = lambda parts: dict(zip(NAMES, parts, strict=True))
    return np.mean(values), in_order(gradient), in_order(adapted)


def test_maml_of_higher():
    higher: Any = pytest.importorskip("higher", reason="needs the package `higher`")

    def adapt_one(net, support, query):
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as inner:
            fast, steps = inner
            for _ in range(STEPS):
                steps.step(torch_loss(fast, support))
            return torch_loss(fast, query), dict(fast.named_parameters())

    assert_same(ours("sgd"), task_by_task(adapt_one))


@pytest.fixture
def wide_by_default():
    """TorchOpt corrects moments by powers in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("wide_by_default")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_inner_loops_of_torchopt(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchopt: Any = pytest.importorskip("torchopt", reason="needs `torchopt`")

    def adapt_one(net, support, query):
        if optimizer == "sgd":
            inner = torchopt.MetaSGD(net, lr=RATE)
        else:
            inner = torchopt.MetaAdam(net, lr=RATE, eps=1e-8, eps_root=1e-8)
        for _ in range(STEPS):
            inner.step(torch_loss(net, support))
        return torch_loss(net, query), dict(net.named_parameters())

    assert_same(ours(optimizer), task_by_task(adapt_one))
