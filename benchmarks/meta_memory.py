"""Temporary memory of the gradient of MAML through 64 inner steps, by `remat`.

One task of 256 examples, four maps of 128 to 128 with tanh between them. `none` keeps
what every step computes, `step` the parameters before each, `nested` those before every
eighth and of the steps between two such one run at a time.
"""

from collections.abc import Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from capibara_eqx.layers import Linear
from capibara_eqx.meta import Task, maml, meta_value_and_grad, sgd

from . import _maml_oracle
from ._harness import Contender, Prepared, Settings, compiled, entries, race
from ._inputs import normal
from ._records import Measurement
from .meta_step import squared_error


OPERATION = "meta_memory"

_RATE = 0.1
REMAT = {"none": None, "step": "step", "nested": "nested"}


class Network(eqx.Module):
    """Maps of equal widths with tanh between them."""

    maps: tuple[Linear, ...]

    def __init__(self, width: int, depth: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, depth)
        self.maps = tuple(Linear(width, width, key=k) for k in keys)

    def __call__(self, x: Float[Array, "n width"]) -> Float[Array, "n width"]:
        for linear in self.maps[:-1]:
            x = jnp.tanh(linear(x))
        return self.maps[-1](x)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a way to remember."""
    steps, examples, width = (5, 6, 4) if settings.quick else (64, 256, 128)
    spec = {"name": f"steps_{steps}", "steps": steps, "examples": examples}
    spec |= {"width": width}
    model = Network(width, 4, key=jax.random.key(0))
    arrays = normal(1, *[(1, examples, width)] * 4)
    contenders = [
        Contender(name, partial(_prepare, model, arrays, steps, remat))
        for name, remat in REMAT.items()
    ]
    weights = [(np.array(m.weight), np.array(m.bias)) for m in model.maps]
    reference = partial(_maml_oracle.maml, weights, arrays, _RATE, steps, "tanh")
    runners = entries(spec, contenders, reference)
    yield from race(settings, OPERATION, "gradient", runners)


def _prepare(
    model: Network, arrays: tuple[np.ndarray, ...], steps: int, remat: str | None
) -> Prepared:
    x, y, x_query, y_query = (jnp.asarray(a) for a in arrays)
    task_loss = maml(squared_error, optimizer=sgd(_RATE), steps=steps, remat=remat)

    def gradients(model, tasks):
        value, found = meta_value_and_grad(task_loss, tasks)(model)
        return value, jax.tree.leaves(found)

    return compiled(gradients, model, Task((x, y), (x_query, y_query)))
