"""A step of meta-training on sines: the gradient of MAML and an update by Adam.

25 tasks of ten points to learn from and ten to be judged by, one inner step of rate
0.01, a network 1-40-40-1 of ReLUs; the same weights and tasks for all. `make_meta_step`
is called from Python for every step (its compile time includes one step), `scan` makes
a hundred in one compiled call.
`torch_func` is `torch.func.grad` within `torch.func.vmap` over the tasks, `higher` its
`innerloop_ctx`, task by task; both end with `torch.optim.Adam` and run on one thread:
arrays are so small that a second costs them time. learn2learn takes no
part: its release 0.2.0 does not build on Python 3.11 or newer (`longintrepr.h`).
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from capibara_eqx.layers import Linear
from capibara_eqx.meta import Task, init_meta_state, make_meta_step, maml, sgd
from capibara_eqx.meta.tasks import sample_sinusoids

from . import _maml_oracle
from ._harness import Contender, Prepared, Settings, compile_timed, entries, race
from ._harness import temp_bytes as temporaries
from ._peers import peer_module, torch_module
from ._records import Measurement


OPERATION = "meta_step"

_INNER_RATE, _RATE = 0.01, 1e-3
# Adam's first average of gradients is this share of the first of them.
_SHARE = 0.1


class Network(eqx.Module):
    """Affine maps with ReLUs between them."""

    maps: tuple[Linear, ...]

    def __init__(self, widths: tuple[int, ...], *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(widths) - 1)
        sizes = zip(widths[:-1], widths[1:], keys, strict=True)
        self.maps = tuple(Linear(before, after, key=k) for before, after, k in sizes)

    def __call__(self, x: Float[Array, "n d_in"]) -> Float[Array, "n d_out"]:
        for linear in self.maps[:-1]:
            x = jax.nn.relu(linear(x))
        return self.maps[-1](x)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation."""
    tasks, shots, hidden, steps = (2, 3, 4, 2) if settings.quick else (25, 10, 40, 100)
    spec = {"name": "sinusoid", "tasks": tasks, "shots": shots, "hidden": hidden}
    model = Network((1, hidden, hidden, 1), key=jax.random.key(0))
    drawn = sample_sinusoids(jax.random.key(1), tasks, shots=shots, queries=shots)
    weights = [(np.array(m.weight), np.array(m.bias)) for m in model.maps]
    arrays = tuple(np.array(a) for a in (*drawn.support, *drawn.query))
    contenders = [
        Contender("make_meta_step", partial(_called, model, drawn)),
        Contender("scan", partial(_scanned, model, drawn, steps)),
        Contender("torch_func", partial(_torch_func, weights, arrays)),
        Contender("higher", partial(_higher, weights, arrays)),
    ]
    reference = partial(_maml_oracle.maml, weights, arrays, _INNER_RATE, 1, "relu")
    runners = entries(spec, contenders, reference)
    yield from race(settings, OPERATION, "train", runners)


def squared_error(
    model: Any, batch: tuple[Array, Array], *, key: PRNGKeyArray | None = None
) -> Float[Array, ""]:
    """The mean squared error on `(x, y)`."""
    del key
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def _step_and_state(model: Network):
    optimizer = optax.adam(_RATE)
    task_loss = maml(squared_error, optimizer=sgd(_INNER_RATE), steps=1)
    return make_meta_step(optimizer, task_loss), init_meta_state(model, optimizer)


def _gradients(state: Any) -> list[Array]:
    """The gradients of the first step, as Adam remembers them after it."""
    return [average / _SHARE for average in jax.tree.leaves(state.opt_state[0].mu)]


def _called(model: Network, tasks: Task) -> Prepared:
    step, state = _step_and_state(model)

    def run():
        return jax.block_until_ready(step(state, tasks))

    start = time.perf_counter()
    run()
    compile_ms = (time.perf_counter() - start) * 1e3

    def outputs(result):
        state, value = result
        return value, _gradients(state)

    return Prepared(run, compile_ms, outputs=outputs)


def _scanned(model: Network, tasks: Task, steps: int) -> Prepared:
    step, start = _step_and_state(model)

    def many(start, tasks):
        first, value = step(start, tasks)
        one = lambda state, _: step(state, tasks)
        last, values = jax.lax.scan(one, first, length=steps - 1)
        return (value, _gradients(first)), last, values

    executable, compile_ms = compile_timed(many, start, tasks)
    return Prepared(
        lambda: jax.block_until_ready(executable(start, tasks)),
        compile_ms,
        temporaries(executable),
        outputs=lambda result: result[0],
        calls=steps,
    )


def _torch_func(weights: _maml_oracle.Weights, tasks: tuple[np.ndarray, ...]):
    torch = torch_module()
    params = _tensors(torch, weights)
    batch = tuple(torch.from_numpy(a) for a in tasks)
    adam = torch.optim.Adam(params, lr=_RATE)

    def loss(params, x, y):
        return torch.mean((_network(torch, params, x) - y) ** 2)

    def task_loss(params, x, y, x_query, y_query):
        inner = torch.func.grad(loss)(params, x, y)
        moved = tuple(p - _INNER_RATE * g for p, g in zip(params, inner, strict=True))
        return loss(moved, x_query, y_query)

    over_tasks = torch.func.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))
    differentiate = torch.func.grad_and_value(
        lambda params: torch.mean(over_tasks(params, *batch))
    )

    def run():
        torch.set_num_threads(1)
        gradients, value = differentiate(tuple(p.detach() for p in params))
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        adam.step()
        return value, gradients

    return Prepared(run, outputs=_as_numpy)


def _higher(weights: _maml_oracle.Weights, tasks: tuple[np.ndarray, ...]):
    torch, higher = torch_module(), peer_module("higher")
    layers = []
    for weight, bias in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight = torch.nn.Parameter(torch.tensor(weight))
        linear.bias = torch.nn.Parameter(torch.tensor(bias))
        layers += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    params = list(model.parameters())
    inner = torch.optim.SGD(params, lr=_INNER_RATE)
    adam = torch.optim.Adam(params, lr=_RATE)
    batch = [torch.from_numpy(a) for a in tasks]
    count = len(tasks[0])

    def run():
        torch.set_num_threads(1)
        adam.zero_grad()
        total = 0.0
        for x, y, x_query, y_query in zip(*batch, strict=True):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (
                adapted,
                descent,
            ):
                descent.step(torch.mean((adapted(x) - y) ** 2))
                loss = torch.mean((adapted(x_query) - y_query) ** 2) / count
                loss.backward()
            total = total + loss.detach()
        # The update writes over the parameters, and leaves these.
        gradients = [p.grad for p in params]
        adam.step()
        return total, gradients

    return Prepared(run, outputs=_as_numpy)


def _tensors(torch: Any, weights: _maml_oracle.Weights) -> tuple[Any, ...]:
    return tuple(torch.nn.Parameter(torch.tensor(a)) for pair in weights for a in pair)


def _network(torch: Any, params: tuple[Any, ...], x: Any) -> Any:
    last = len(params) // 2 - 1
    for layer in range(last + 1):
        x = torch.nn.functional.linear(x, params[2 * layer], params[2 * layer + 1])
        x = x if layer == last else torch.relu(x)
    return x


def _as_numpy(result: tuple[Any, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    value, gradients = result
    return value.detach().numpy(), [g.detach().numpy() for g in gradients]
