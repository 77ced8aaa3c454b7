"""Implicit meta-gradients beside those of TorchOpt."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.precision import enable_x64

from capibara_eqx.meta import Task, imaml, meta_value_and_grad, sgd


pytestmark = pytest.mark.slow

TASKS, N, D, WIDTH, STRENGTH, STEPS = 2, 6, 3, 4, 0.5, 600
RATE = 0.3
RNG = np.random.default_rng(0)
START = {
    "up": 0.7 * RNG.standard_normal((WIDTH, D)),
    "bias": 0.3 * RNG.standard_normal(WIDTH),
    "down": 0.7 * RNG.standard_normal((1, WIDTH)),
}
SUPPORT, QUERY = (
    (RNG.standard_normal((TASKS, N, D)), RNG.standard_normal((TASKS, N, 1)))
    for _ in range(2)
)


def loss(model, batch, *, key=None):
    x, y = batch
    hidden = jnp.tanh(x @ model["up"].T + model["bias"][None])
    return jnp.mean((hidden @ model["down"].T - y) ** 2)


def ours():
    with enable_x64(True):
        start, tasks = jax.tree.map(jnp.asarray, (START, Task(SUPPORT, QUERY)))
        task_loss = imaml(
            loss,
            strength=STRENGTH,
            optimizer=sgd(RATE),
            steps=STEPS,
            cg_tolerance=1e-12,
        )
        run = jax.jit(lambda start: meta_value_and_grad(task_loss, tasks)(start))
        return jax.tree.map(np.asarray, run(start))


def theirs(torch, torchopt):
    functional = torch.nn.functional

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in START.items():
                self.register_parameter(name, torch.nn.Parameter(torch.tensor(value)))

        def forward(self, x):
            hidden = torch.tanh(functional.linear(x, self.up, self.bias))
            return functional.linear(hidden, self.down)

    solver = torchopt.linear_solve.solve_normal_cg(maxiter=200, rtol=1e-14, atol=0)
    options: Any = {"linear_solve": solver}

    class Inner(torchopt.nn.ImplicitMetaGradientModule, **options):
        def __init__(self, start):
            super().__init__()
            self.start = start
            self.network = torchopt.module_clone(start, by="deepcopy")
            for name, param in start.named_parameters():
                getattr(self.network, name).data.copy_(param.data)
                getattr(self.network, name).requires_grad_(True)

        def objective(self, x, y):
            pairs = zip(self.network.parameters(), self.start.parameters(), strict=True)
            distance = sum(((p - q) ** 2).sum() for p, q in pairs)
            return functional.mse_loss(self.network(x), y) + STRENGTH / 2 * distance

        def solve(self, x, y):
            params = tuple(self.parameters())
            optimizer = torch.optim.SGD(params, lr=RATE)
            with torch.enable_grad():
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    self.objective(x, y).backward(inputs=params)
                    optimizer.step()
            return self

    start, total = Network(), torch.zeros(())
    for task in range(TASKS):
        part = lambda batch, task=task: [torch.tensor(x[task]) for x in batch]
        inner = Inner(start)
        inner.solve(*part(SUPPORT))
        x, y = part(QUERY)
        total = total + functional.mse_loss(inner.network(x), y) / TASKS
    gradients = torch.autograd.grad(total, list(start.parameters()))
    names = [name for name, _ in start.named_parameters()]
    return total.item(), dict(zip(names, (g.numpy() for g in gradients), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_the_gradients_are_those_of_torchopt():
    torch = pytest.importorskip("torch")
    torchopt = pytest.importorskip("torchopt")
    value, gradients = ours()
    expected_value, expected = theirs(torch, torchopt)
    assert abs(value - expected_value) < 1e-10
    for name in START:
        np.testing.assert_allclose(gradients[name], expected[name], atol=1e-10)
